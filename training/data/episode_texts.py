"""Episodes: images shown one after another, then a question about one of them by its place.

Deterministic given the random generator; no pixels and no torch here.
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
    """Which image is asked about, from 0."""
    text: str
    answer: str
    distance: int
    """Images between that step and the question: 0 for the last image shown."""


@dataclass(frozen=True)
class Episode:
    """Two to twenty images in order; training uses two to eight.

    Indices and captions are the caller's, and all captions differ.
    """

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
        """The same images in reverse order: a memory without order cannot tell the two apart.

        Of an odd number the middle one keeps its place, so its neighbours move past it: the order is
        rotated by one instead and every answer changes.
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
