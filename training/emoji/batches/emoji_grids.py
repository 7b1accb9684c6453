"""Pictures of up to four small emoji on a 2 x 2 grid, and labels of what lies under each patch of a picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from microvlm.training.emoji.batches.drawing_sampler import DrawingSampler
from microvlm.training.emoji.data.scene_drawing import compose_emoji_grids
from microvlm.training.emoji.data.scenes import Scene


class EmojiGrids(NamedTuple):
    """B pictures of small emoji, which only the vision encoder is trained on."""

    pixels: Tensor
    """float32 [B, 3, S, S] in 0..1."""
    labels: np.ndarray
    """int64 [B, 4]: label of the emoji in each quarter."""
    places: np.ndarray
    """float32 [B, 4, 3]: x, y and size, as in `Placed`; size 0 for an empty quarter."""


def patch_labels(labels: np.ndarray, places: np.ndarray, side: int) -> np.ndarray:
    """Label the side x side patches of pictures, int64 [B, side * side].

    A patch whose centre lies in an object's square has 1 + that object's label, any other patch 0.

    labels : int64 [B, n]. places : x, y and size, [B, n, 3].
    """
    centre = (np.arange(side) + 0.5) / side
    half = places[:, :, 2, None] / 2
    columns = np.abs(centre - places[:, :, 0, None]) < half
    rows = np.abs(centre - places[:, :, 1, None]) < half
    inside = rows[:, :, :, None] & columns[:, :, None, :]
    return (inside * (1 + labels)[:, :, None, None]).max(1).reshape(len(labels), side * side)


def scene_labels(scenes: list[Scene], label_of: np.ndarray, side: int) -> np.ndarray:
    """`patch_labels` of scenes; object o has the label `label_of[o]`."""
    labels, places = np.zeros((len(scenes), 4), np.int64), np.zeros((len(scenes), 4, 3))
    for b, scene in enumerate(scenes):
        for j, placed in enumerate(scene.objects):
            labels[b, j], places[b, j] = label_of[placed.object], (placed.x, placed.y, placed.size)
    return patch_labels(labels, places, side)


def sample_emoji_grids(
    sampler: DrawingSampler,
    label_of: np.ndarray,
    count: int,
    size: int,
    strength: float,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> EmojiGrids:
    """`count` pictures of one to four emoji, each within its own quarter. `label_of`: the label of every emoji row."""
    if count == 0:
        return EmojiGrids(torch.zeros(0, 3, size, size), np.zeros((0, 4), np.int64), np.zeros((0, 4, 3)))
    rows = sampler.rows(4 * count, generator)
    scale = rng.uniform(0.28, 0.48, (count, 4, 1))
    quarter = np.stack([np.arange(4) % 2, np.arange(4) // 2], -1) * 0.5
    corner = quarter + rng.random((count, 4, 2)) * (0.5 - scale)
    places = np.concatenate([corner + scale / 2, scale], -1)
    order = rng.permuted(np.tile(np.arange(4), (count, 1)), axis=1)
    places[:, :, 2] *= order < rng.integers(1, 5, (count, 1))
    drawings = sampler.pixels(rows, sampler.vendors_of(rows, generator)).unflatten(0, (count, 4))
    pixels = compose_emoji_grids(drawings, torch.from_numpy(places).float(), size, generator, strength)
    return EmojiGrids(pixels, label_of[rows].reshape(count, 4), places)
