"""Computes the prefix embeddings of several views of each drawing once and caches them, for a frozen vision encoder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from microvlm.atomic import new_file
from microvlm.model.checkpoint import write_tensors
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_ops import full_precision
from microvlm.model.vision import normalise
from microvlm.training.emoji.batches.drawing_sampler import DrawingSampler
from microvlm.training.emoji.data.views import augment_emoji, corner_neighbour

PREFIXES_FORMAT = 1
"""Raised whenever a change to this module or to the views changes the cached values."""
CHUNK = 64
"""Drawings that are encoded together; the small pictures in corners come from the same chunk."""


class CachedPrefixes(NamedTuple):
    """Prefix embeddings of D drawings in V views each."""

    prefixes: Tensor
    """float16 [D, V, k, H]."""
    objects: np.ndarray
    """int64 [D], ascending: an emoji row, or the number of emoji plus the row of another drawing. An object may have
    several drawings."""
    first: np.ndarray
    """int64 [D]: index of the first drawing of the same object."""
    number: np.ndarray
    """int64 [D]: number of drawings of the same object."""

    def views(self, objects: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Sample two views of a drawing of each object [n] -> float32 [2 n, k, H]: all first views, then all second.

        Equal objects show the same drawing.
        """
        own, place = np.unique(objects, return_inverse=True)
        start = np.searchsorted(self.objects, own)
        drawing = (start + rng.integers(self.number[start]))[place]
        views = self.prefixes.shape[1]
        first = rng.integers(views, size=len(objects))
        second = (first + rng.integers(1, views, size=len(objects))) % views
        drawings, chosen = np.concatenate([drawing, drawing]), np.concatenate([first, second])
        return self.prefixes[torch.from_numpy(drawings), torch.from_numpy(chosen)].float()


def trained_drawings(
    sampler: DrawingSampler, rows: np.ndarray, first_object: int, others: np.ndarray | None
) -> tuple[np.ndarray, list[tuple[str | None, int]]]:
    """List the drawings of the emoji `rows` and then `others`: (object of each, int64 [D]; where each is).

    A drawing is at (vendor, emoji row) or at (None, row of `others`); objects of `others` count from `first_object`.
    """
    objects: list[int] = []
    places: list[tuple[str | None, int]] = []
    for row in rows:
        for vendor, share in zip(sampler.vendors, np.diff(sampler.cumulative[row], prepend=0.0), strict=True):
            if share > 0:
                objects.append(int(row))
                places.append((vendor, int(row)))
    count = 0 if others is None else len(others)
    objects += range(first_object, first_object + count)
    places += [(None, row) for row in range(count)]
    return np.array(objects, np.int64), places


def load_or_encode(
    folder: Path,
    model: MicroVLM,
    sampler: DrawingSampler,
    rows: np.ndarray,
    first_object: int,
    others: np.ndarray | None,
    views: int,
    strength: float,
    seed: int,
) -> CachedPrefixes:
    """Encode `views` views of every drawing, or read them from `folder` if a run has done so before.

    The file's name is a hash of everything its content depends on: pixels, weights, number, strength and seed of views.
    """
    objects, places = trained_drawings(sampler, rows, first_object, others)
    hashed = hashlib.sha256(
        f"{PREFIXES_FORMAT} {CHUNK} {views} {strength} {seed} {model.config.vision}".encode()
    )
    for place in places:
        hashed.update(f"{place}".encode() + _pixels(sampler, others, *place).tobytes())
    for part in (model.vision, model.adapter):
        for tensor in part.state_dict().values():
            hashed.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    path = folder / f"pictures-{hashed.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        with full_precision(model.memory_prior.device.type):
            prefixes = encode_views(model, sampler, places, others, views, strength, seed)
        with new_file(path) as temporary:
            write_tensors({"prefixes": prefixes}, temporary)
    prefixes = load_file(str(path))["prefixes"]
    _, first, inverse, count = np.unique(objects, return_index=True, return_inverse=True, return_counts=True)
    return CachedPrefixes(prefixes, objects, first[inverse], count[inverse])


@torch.no_grad()
def encode_views(
    model: MicroVLM,
    sampler: DrawingSampler,
    places: list[tuple[str | None, int]],
    others: np.ndarray | None,
    views: int,
    strength: float,
    seed: int,
) -> Tensor:
    """Encode `views` random views of each of the drawings at `places`: float16 [D, V, k, H]."""
    generator = torch.Generator().manual_seed(seed)
    # In random order, so that the drawings of a chunk do not resemble each other, as in a batch.
    order = torch.randperm(len(places), generator=generator).numpy()
    config, device = model.config, model.memory_prior.device
    shape = (len(places), views, config.prefix_tokens, config.text.hidden_size)
    prefixes = torch.empty(shape, dtype=torch.float16)
    for start in range(0, len(order), CHUNK):
        chunk = order[start : start + CHUNK]
        pixels = np.stack([_pixels(sampler, others, *places[index]) for index in chunk])
        drawings = torch.from_numpy(pixels).repeat_interleave(views, 0)
        images = corner_neighbour(augment_emoji(drawings, generator, strength), generator)
        encoded = model.encode_image(normalise(images, config.vision).to(device))
        prefixes[torch.from_numpy(chunk)] = encoded.half().cpu().view(len(chunk), *shape[1:])
    return prefixes


def _pixels(sampler: DrawingSampler, others: np.ndarray | None, vendor: str | None, row: int) -> np.ndarray:
    if vendor is not None:
        return np.asarray(sampler.images[vendor][row])
    assert others is not None
    return np.asarray(others[row])
