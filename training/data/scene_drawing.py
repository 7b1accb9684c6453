"""Pictures of several emoji, batched in torch: scenes on a named ground, and crowds for the vision encoder alone.

Deterministic given the generator; knows nothing about captions, questions or files. Every image is float32
[B, 3, H, W] in 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from microvlm.training.data.drawing_sources import TRAIN_VENDORS, DataError
from microvlm.training.data.emoji import EmojiData, load_emoji
from microvlm.training.data.scenes import GROUNDS, Scene, read_scene_objects
from microvlm.training.data.views import Random, affine_map, ink, place, premultiply, random_ground, recolour

# Objects in a scene are 29 to 44 of 96 pixels: sampled from half-size drawings they do not alias.
_SCENE_SOURCE = 48
# Black line art vanishes on a black ground.
SCENE_VENDORS = tuple(v for v in TRAIN_VENDORS if v != "fluent-emoji-high-contrast")


@lru_cache(maxsize=16)
def _scene_drawings(folder: Path, vendor: str) -> tuple[Tensor, np.ndarray]:
    """Premultiplied float32 [48, 4, 48, 48] of the scene objects, and bool [48]: drawn by this vendor."""
    emoji = load_emoji(folder)
    rows = [emoji.index(hexcode) for hexcode, _ in read_scene_objects()]
    pre = premultiply(torch.from_numpy(np.array(emoji.images(vendor)[rows])))
    return F.interpolate(pre, size=_SCENE_SOURCE, mode="area"), emoji.present(vendor)[rows]


def compose_scenes(
    specs: Sequence[Scene],
    emoji: EmojiData,
    vendor_choice: Sequence[str] | None = None,
    size: int = 96,
    generator: torch.Generator | None = None,
    strength: float = 0.0,
) -> Tensor:
    """[B, 3, size, size] float32 of B scenes.

    vendor_choice : the vendor of each scene; None draws, per object, any of SCENE_VENDORS that has it.
    strength : 0 draws upright on a flat ground, as the evaluation set does; up to 1 varies the objects' colours,
    outlines and rotation, and adds brightness and noise that leave the name of the ground's colour alone.
    """
    rand = Random(generator, torch.device("cpu"))
    pieces: list[Tensor] = []
    owner: list[int] = []
    slot: list[int] = []
    geometry: list[tuple[float, float, float]] = []
    picks = rand(len(specs), 4).tolist()
    for b, scene in enumerate(specs):
        for j, thing in enumerate(scene.objects):
            vendors = [vendor_choice[b]] if vendor_choice is not None else list(SCENE_VENDORS)
            sheets = [_scene_drawings(emoji.folder, v) for v in vendors]
            drawn = [pre for pre, present in sheets if present[thing.object]]
            if not drawn:
                raise DataError(f"{vendors[0]} does not draw scene object {thing.object}.")
            pieces.append(drawn[int(picks[b][j] * len(drawn))][thing.object])
            owner.append(b)
            slot.append(j)
            geometry.append((thing.x, thing.y, thing.size))
    layers = _lay(rand, torch.stack(pieces), torch.tensor(geometry), size, strength)
    colours = torch.tensor([rgb for _, rgb in GROUNDS], dtype=torch.float32) / 255
    images = colours[[scene.ground for scene in specs]].view(-1, 3, 1, 1).repeat(1, 1, size, size)
    return _stack(rand, images, layers, torch.tensor(owner), torch.tensor(slot), strength)


def compose_crowds(
    drawings: Tensor, geometry: Tensor, size: int, generator: torch.Generator, strength: float
) -> Tensor:
    """[B, 3, size, size] of any emoji side by side on random grounds: small objects of every kind, for the vision
    encoder alone.

    drawings : uint8 [B, n, H, W, 4]. geometry : float32 [B, n, 3], x, y and size of each as `Placed` has them; a
    size of 0 leaves the object out.
    """
    rand = Random(generator, drawings.device)
    batch, each = drawings.shape[:2]
    pre = F.interpolate(premultiply(drawings.flatten(0, 1)), size=_SCENE_SOURCE, mode="area")
    where = geometry.flatten(0, 1)
    here = torch.nonzero(where[:, 2] > 0).flatten()
    layers = _lay(rand, pre[here], where[here], size, strength)
    ground = random_ground(rand, batch, size, 1.0)
    return _stack(rand, ground, layers, here // each, here % each, strength)


def _lay(rand: Random, pieces: Tensor, where: Tensor, size: int, strength: float) -> Tensor:
    """Premultiplied drawings [n, 4, h, w] at x, y, size [n, 3] of a frame: [n, 4, size, size].

    A vendor's style is a palette and a way to draw edges: both are varied, or an unseen vendor's is never met.
    """
    count = len(pieces)
    if strength:
        pieces = pieces.clone()
        recolour(rand, pieces, strength)
    angle = rand(count, low=-1, high=1) * strength * math.radians(15)
    shear = rand(count, low=-0.1, high=0.1) * strength
    mirror = torch.ones(count)
    placed = place(
        pieces, affine_map(where[:, 2], angle, shear, where[:, 0] * 2 - 1, where[:, 1] * 2 - 1, mirror), size
    )
    if strength:
        ink(rand, placed, strength)
    return placed


def _stack(
    rand: Random, images: Tensor, layers: Tensor, owners: Tensor, slots: Tensor, strength: float
) -> Tensor:
    """Layers [n, 4, S, S] over the grounds [B, 3, S, S] that own them, slot after slot; then light and noise."""
    for slot in range(4):
        here = torch.nonzero(slots == slot).flatten()
        if len(here):
            layer, target = layers[here], owners[here]
            images[target] = layer[:, :3] + (1 - layer[:, 3:]) * images[target]
    count, size = len(images), images.shape[-1]
    if strength:
        images *= 1 + rand(count, 1, 1, 1, low=-0.15, high=0.15) * strength
        images += rand(count, 3, 1, 1, low=-0.05, high=0.05) * strength
        images += rand(count, 3, size, size, low=-0.06, high=0.06) * strength
    return images.clamp_(0, 1)
