"""Draws pictures of several emoji, batched in torch: scenes on a named ground, and emoji on a grid.

Deterministic given the generator; knows no captions, questions or files. Images are float32 [B, 3, H, W] in 0..1.
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

from microvlm.training.emoji.data.drawing_sources import TRAIN_VENDORS, DataError
from microvlm.training.emoji.data.emoji import EmojiData, load_emoji
from microvlm.training.emoji.data.scenes import GROUNDS, Scene, read_scene_objects
from microvlm.training.emoji.data.views import (
    Random,
    affine_map,
    ink,
    place,
    premultiply,
    random_ground,
    recolour,
)

# Objects in a scene are 29 to 44 of 96 pixels: sampled from half-size drawings they do not alias.
_SCENE_SOURCE = 48
# Black line art vanishes on a black ground.
SCENE_VENDORS = tuple(v for v in TRAIN_VENDORS if v != "fluent-emoji-high-contrast")


@lru_cache(maxsize=16)
def _scene_drawings(folder: Path, vendor: str) -> tuple[Tensor, np.ndarray]:
    """Premultiplied drawings of the scene objects, float32 [48, 4, 48, 48], and which the vendor drew, bool [48]."""
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
    """Draw B scenes, float32 [B, 3, size, size].

    vendor_choice : the vendor of each scene; None samples one of SCENE_VENDORS for each object.
    strength : 0 draws upright on a flat ground, as in the evaluation set; values up to 1 vary the objects' colours,
    outlines and rotation, and add brightness and noise that do not change the name of the ground's colour.
    """
    rand = Random(generator, torch.device("cpu"))
    pieces: list[Tensor] = []
    owner: list[int] = []
    slot: list[int] = []
    geometry: list[tuple[float, float, float]] = []
    picks = rand(len(specs), 4).tolist()
    for b, scene in enumerate(specs):
        for j, placed in enumerate(scene.objects):
            vendors = [vendor_choice[b]] if vendor_choice is not None else list(SCENE_VENDORS)
            sheets = [_scene_drawings(emoji.folder, v) for v in vendors]
            drawn = [pre for pre, present in sheets if present[placed.object]]
            if not drawn:
                raise DataError(f"{vendors[0]} does not draw scene object {placed.object}.")
            pieces.append(drawn[int(picks[b][j] * len(drawn))][placed.object])
            owner.append(b)
            slot.append(j)
            geometry.append((placed.x, placed.y, placed.size))
    layers = _lay(rand, torch.stack(pieces), torch.tensor(geometry), size, strength)
    colours = torch.tensor([rgb for _, rgb in GROUNDS], dtype=torch.float32) / 255
    images = colours[[scene.ground for scene in specs]].view(-1, 3, 1, 1).repeat(1, 1, size, size)
    return _stack(rand, images, layers, torch.tensor(owner), torch.tensor(slot), strength)


def compose_emoji_grids(
    drawings: Tensor, geometry: Tensor, size: int, generator: torch.Generator, strength: float
) -> Tensor:
    """Draw any emoji side by side on random grounds, float32 [B, 3, size, size].

    drawings : uint8 [B, n, H, W, 4]. geometry : float32 [B, n, 3], x, y and size of each, as in `Placed`; an object of
    size 0 is left out.
    """
    rand = Random(generator, drawings.device)
    batch, each = drawings.shape[:2]
    pre = F.interpolate(premultiply(drawings.flatten(0, 1)), size=_SCENE_SOURCE, mode="area")
    places = geometry.flatten(0, 1)
    present = torch.nonzero(places[:, 2] > 0).flatten()
    layers = _lay(rand, pre[present], places[present], size, strength)
    ground = random_ground(rand, batch, size, 1.0)
    return _stack(rand, ground, layers, present // each, present % each, strength)


def _lay(rand: Random, pieces: Tensor, places: Tensor, size: int, strength: float) -> Tensor:
    """Place premultiplied drawings [n, 4, h, w] at x, y, size [n, 3] of a frame: [n, 4, size, size].

    Colours and edges are varied, because they make up a vendor's style and the test vendor's is unknown.
    """
    count = len(pieces)
    if strength:
        pieces = pieces.clone()
        recolour(rand, pieces, strength)
    angle = rand(count, low=-1, high=1) * strength * math.radians(15)
    shear = rand(count, low=-0.1, high=0.1) * strength
    mirror = torch.ones(count)
    placed = place(
        pieces,
        affine_map(places[:, 2], angle, shear, places[:, 0] * 2 - 1, places[:, 1] * 2 - 1, mirror),
        size,
    )
    if strength:
        ink(rand, placed, strength)
    return placed


def _stack(
    rand: Random, images: Tensor, layers: Tensor, owners: Tensor, slots: Tensor, strength: float
) -> Tensor:
    """Put layers [n, 4, S, S] over their grounds [B, 3, S, S], slot after slot, and add brightness and noise."""
    for slot in range(4):
        rows = torch.nonzero(slots == slot).flatten()
        if len(rows):
            layer, target = layers[rows], owners[rows]
            images[target] = layer[:, :3] + (1 - layer[:, 3:]) * images[target]
    count, size = len(images), images.shape[-1]
    if strength:
        images *= 1 + rand(count, 1, 1, 1, low=-0.15, high=0.15) * strength
        images += rand(count, 3, 1, 1, low=-0.05, high=0.05) * strength
        images += rand(count, 3, size, size, low=-0.06, high=0.06) * strength
    return images.clamp_(0, 1)
