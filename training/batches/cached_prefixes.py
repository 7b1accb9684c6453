"""Pictures of objects as frozen vision encoder and adapter see them, computed once: several views of each drawing."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_ops import full_precision
from microvlm.model.vision import normalise
from microvlm.training.batches.drawing_sampler import DrawingSampler
from microvlm.training.data.views import augment_emoji, corner_neighbour

FORMAT = 1
"""Counted up when what is seen changes by this code or by that of the views."""
CHUNK = 64
"""Drawings that are seen together; the small pictures in corners are of the same chunk."""


class Pictures(NamedTuple):
    """D drawings in V views each."""

    prefixes: Tensor
    """float16 [D, V, k, H]."""
    objects: np.ndarray
    """int64 [D], rising: the emoji row, or behind all emoji the row of another drawing; an object may have several."""
    first: np.ndarray
    """int64 [D]: where the drawings of this one's object begin."""
    number: np.ndarray
    """int64 [D]: how many they are."""

    def views(self, objects: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Objects [n] -> float32 [2 n, k, H]: two views of each, of one drawing, which facts of one object share."""
        own, place = np.unique(objects, return_inverse=True)
        start = np.searchsorted(self.objects, own)
        drawing = (start + rng.integers(self.number[start]))[place]
        views = self.prefixes.shape[1]
        one = rng.integers(views, size=len(objects))
        other = (one + rng.integers(1, views, size=len(objects))) % views
        rows = np.concatenate([drawing, drawing]), np.concatenate([one, other])
        return self.prefixes[torch.from_numpy(rows[0]), torch.from_numpy(rows[1])].float()


def trained_drawings(
    sampler: DrawingSampler, rows: np.ndarray, behind: int, others: np.ndarray | None
) -> tuple[np.ndarray, list[tuple[str | None, int]]]:
    """(objects [D], where each drawing is: a vendor and a row, or None and a row of `others`), emoji `rows` first."""
    objects: list[int] = []
    places: list[tuple[str | None, int]] = []
    for row in rows:
        for vendor, share in zip(sampler.vendors, np.diff(sampler.cumulative[row], prepend=0.0), strict=True):
            if share > 0:
                objects.append(int(row))
                places.append((vendor, int(row)))
    count = 0 if others is None else len(others)
    objects += range(behind, behind + count)
    places += [(None, row) for row in range(count)]
    return np.array(objects, np.int64), places


def see_once(
    folder: Path,
    model: MicroVLM,
    sampler: DrawingSampler,
    rows: np.ndarray,
    behind: int,
    others: np.ndarray | None,
    views: int,
    strength: float,
    seed: int,
) -> Pictures:
    """As `see`, kept in a file of `folder` that is named by all it depends on: a resumed run does not look again."""
    objects, places = trained_drawings(sampler, rows, behind, others)
    hashed = hashlib.sha256(f"{FORMAT} {CHUNK} {views} {strength} {seed} {model.config.vision}".encode())
    for place in places:
        hashed.update(f"{place}".encode() + _pixels(sampler, others, *place).tobytes())
    for part in (model.vision, model.adapter):
        for tensor in part.state_dict().values():
            hashed.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    path = folder / f"pictures-{hashed.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        with full_precision(model.memory_prior.device.type):
            prefixes = see(model, sampler, places, others, views, strength, seed)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            save_file({"prefixes": prefixes}, f"{aside}/{path.name}")
            Path(aside, path.name).replace(path)
    prefixes = load_file(str(path))["prefixes"]
    _, first, inverse, count = np.unique(objects, return_index=True, return_inverse=True, return_counts=True)
    return Pictures(prefixes, objects, first[inverse], count[inverse])


@torch.no_grad()
def see(
    model: MicroVLM,
    sampler: DrawingSampler,
    places: list[tuple[str | None, int]],
    others: np.ndarray | None,
    views: int,
    strength: float,
    seed: int,
) -> Tensor:
    """float16 [D, V, k, H]: `views` views of the drawings at `places`."""
    generator = torch.Generator().manual_seed(seed)
    # Chunks of drawings that do not resemble each other, as batches have.
    order = torch.randperm(len(places), generator=generator).numpy()
    config, device = model.config, model.memory_prior.device
    shape = (len(places), views, config.prefix_tokens, config.text.hidden_size)
    prefixes = torch.empty(shape, dtype=torch.float16)
    for start in range(0, len(order), CHUNK):
        some = order[start : start + CHUNK]
        pixels = np.stack([_pixels(sampler, others, *places[index]) for index in some])
        shown = torch.from_numpy(pixels).repeat_interleave(views, 0)
        seen = corner_neighbour(augment_emoji(shown, generator, strength), generator)
        found = model.encode_image(normalise(seen, config.vision).to(device))
        prefixes[torch.from_numpy(some)] = found.half().cpu().view(len(some), *shape[1:])
    return prefixes


def _pixels(sampler: DrawingSampler, others: np.ndarray | None, vendor: str | None, row: int) -> np.ndarray:
    if vendor is not None:
        return np.asarray(sampler.images[vendor][row])
    assert others is not None
    return np.asarray(others[row])
