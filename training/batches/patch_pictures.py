"""What lies under each patch of a picture, and pictures of many small emoji to learn it from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from microvlm.training.batches.drawing_sampler import DrawingSampler
from microvlm.training.data.scene_drawing import compose_crowds
from microvlm.training.data.scenes import Scene


class Crowd(NamedTuple):
    """Small emoji side by side, for the vision encoder alone."""

    pixels: Tensor
    """float32 [B, 3, S, S] in 0..1."""
    labels: np.ndarray
    """int64 [B, 4], `label_of` each."""
    places: np.ndarray
    """float32 [B, 4, 3]: x, y, size, as `Placed` has them; size 0 where there is none."""


def patch_labels(labels: np.ndarray, places: np.ndarray, side: int) -> np.ndarray:
    """int64 [B, n] and x, y, size [B, n, 3] -> int64 [B, side * side]: 1 + the label of the object whose drawing holds
    a patch's centre, 0 for the ground."""
    centre = (np.arange(side) + 0.5) / side
    half = places[:, :, 2, None] / 2
    columns = np.abs(centre - places[:, :, 0, None]) < half
    rows = np.abs(centre - places[:, :, 1, None]) < half
    inside = rows[:, :, :, None] & columns[:, :, None, :]
    return (inside * (1 + labels)[:, :, None, None]).max(1).reshape(len(labels), side * side)


def scene_labels(scenes: list[Scene], label_of: np.ndarray, side: int) -> np.ndarray:
    """`patch_labels` of scenes, object o having label `label_of[o]`."""
    labels, places = np.zeros((len(scenes), 4), np.int64), np.zeros((len(scenes), 4, 3))
    for b, scene in enumerate(scenes):
        for j, placed in enumerate(scene.objects):
            labels[b, j], places[b, j] = label_of[placed.object], (placed.x, placed.y, placed.size)
    return patch_labels(labels, places, side)


def draw_crowd(
    sampler: DrawingSampler,
    label_of: np.ndarray,
    count: int,
    size: int,
    strength: float,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> Crowd:
    """`count` images of one to four emoji, each within its own quarter. `label_of`: the label of every emoji row."""
    if count == 0:
        return Crowd(torch.zeros(0, 3, size, size), np.zeros((0, 4), np.int64), np.zeros((0, 4, 3)))
    rows = sampler.rows(4 * count, generator)
    scale = rng.uniform(0.28, 0.48, (count, 4, 1))
    quarter = np.stack([np.arange(4) % 2, np.arange(4) // 2], -1) * 0.5
    corner = quarter + rng.random((count, 4, 2)) * (0.5 - scale)
    places = np.concatenate([corner + scale / 2, scale], -1)
    order = rng.permuted(np.tile(np.arange(4), (count, 1)), axis=1)
    places[:, :, 2] *= order < rng.integers(1, 5, (count, 1))
    drawings = sampler.pixels(rows, sampler.vendors_of(rows, generator)).unflatten(0, (count, 4))
    pixels = compose_crowds(drawings, torch.from_numpy(places).float(), size, generator, strength)
    return Crowd(pixels, label_of[rows].reshape(count, 4), places)
