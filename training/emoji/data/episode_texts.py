"""Samples evaluation episodes: images shown one after another, then questions about them by their place.

Deterministic given the random generator; knows no pixels and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from microvlm.memory.ordinal_questions import ORDINALS, ordinal_question


@dataclass(frozen=True)
class EpisodeQuestion:
    """A question about one step of an episode."""

    step: int
    """Index of the image that is asked about."""
    text: str
    answer: str
    distance: int
    """Images between that step and the question; 0 for the last image."""


@dataclass(frozen=True)
class Episode:
    """Two to twenty images in order, as indices of the caller's, with captions that all differ."""

    images: tuple[int, ...]
    captions: tuple[str, ...]

    def questions(self) -> list[EpisodeQuestion]:
        """One question for each image."""
        last = len(self.images) - 1
        return [
            EpisodeQuestion(i, ordinal_question(i), caption, last - i)
            for i, caption in enumerate(self.captions)
        ]

    def swapped(self) -> Episode:
        """The same images in another order, which changes every answer; a memory without order cannot tell them apart.

        The order is reversed for an even number of images. For an odd number the middle image would keep its place, so
        the order is rotated by one.
        """
        turn = (lambda x: x[1:] + x[:1]) if len(self.images) % 2 else (lambda x: x[::-1])
        return Episode(turn(self.images), turn(self.captions))


def sample_episode(
    rng: np.random.Generator, candidates: Sequence[int], captions: Sequence[str], length: int = 2
) -> Episode:
    """An episode of `length` different images.

    candidates : the row numbers to choose from; captions : the caption of every row.
    """
    if not 2 <= length <= len(ORDINALS):
        raise ValueError(f"an episode has 2 to {len(ORDINALS)} images, not {length}")
    chosen = rng.choice(np.asarray(candidates), length, replace=False)
    return Episode(tuple(int(i) for i in chosen), tuple(captions[i] for i in chosen))
