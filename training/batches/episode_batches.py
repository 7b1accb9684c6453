"""Samples episodes: which images of a batch an episode shows, in which order, and which of them it asks for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MAX_EPISODE = 8


class EpisodeBatch(NamedTuple):
    """n episodes over n images of a batch; each image stands in several episodes."""

    images: np.ndarray
    """int64 [n, length]: image shown at each step, an index into the batch's n images."""
    steps: np.ndarray
    """int64 [n]: the step that the episode's question asks for."""


def sample_episode_batch(rng: np.random.Generator, count: int) -> EpisodeBatch:
    """`count` episodes of one length, between two and eight images."""
    length = int(rng.integers(2, min(MAX_EPISODE, count) + 1))
    images = np.stack([rng.permutation(count)[:length] for _ in range(count)])
    return EpisodeBatch(images, rng.integers(0, length, count))
