"""Samples batches of facts: objects, questions, which facts share a memory, and two views of each object."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from microvlm.training.emoji.batches.drawing_sampler import DrawingSampler
from microvlm.training.emoji.data.emoji import EmojiData
from microvlm.training.emoji.data.fact_texts import Fact, sample_facts
from microvlm.training.emoji.data.views import augment_emoji, corner_neighbour

FACT_SET_SIZE = 82
"""Facts that are sampled together, approximately: the written ones fill the 64 slots of `nano`."""
MEMORY_COUNTS = (1, 1, 1, 2, 2, 4)
"""Memories that a set of facts is divided among, equally likely: few memories are full, many hold little."""
UNWRITTEN_SHARE = 0.2
TEXT_SHARE = 0.1
"""Share of the facts without a picture."""
PAIRED_SHARE = 0.35
"""Share of the facts about the same object as the fact before: only the question tells the two apart."""
RUN_SHARE, RUN_LENGTH = 0.5, 4
"""Share of the sets whose objects come in runs of consecutive rows, which resemble each other."""


ObjectChooser = Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray]]
"""(generator, facts with a picture, facts in words alone) -> the objects of each, int64."""


class FactBatch(NamedTuple):
    """F facts: those with a picture, then those in words alone."""

    pictured: list[Fact]
    text_only: list[Fact]
    views: Tensor
    """float32 [2 * len(pictured), 3, S, S]: the views that are written, then the views that are asked about."""
    group: np.ndarray
    """int64 [F]: the memory that each fact belongs to."""
    is_written: np.ndarray
    """bool [F]; questions are asked about the unwritten facts too."""

    @property
    def facts(self) -> list[Fact]:
        return [*self.pictured, *self.text_only]


class FactSampler:
    """Samples facts about objects: emoji drawn by the training vendors (`rows`, by default all that are not held out)
    and, with probability `drawing_share`, other drawings, which have no name (`drawings`, uint8 [D, S, S, 4]).

    An object is an emoji row, or the number of emoji plus a row of `drawings`.
    """

    def __init__(
        self,
        emoji: EmojiData,
        sampler: DrawingSampler,
        count: int,
        strength: float,
        rows: np.ndarray | None = None,
        drawings: np.ndarray | None = None,
        drawing_share: float = 0.0,
    ):
        self.emoji, self.sampler, self.strength = emoji, sampler, strength
        self.rows = np.flatnonzero(sampler.drawn & ~emoji.held_out) if rows is None else rows
        self.drawings, self.drawing_share = drawings, drawing_share
        sets = max(1, round(count / FACT_SET_SIZE))
        ends = [count * place // sets for place in range(sets + 1)]
        self.sizes = [end - start for start, end in pairwise(ends)]
        """Facts in each set of a batch."""

    def sample(self, rng: np.random.Generator, generator: torch.Generator) -> FactBatch:
        """A batch with views."""
        batch = self.sample_facts(rng)
        drawings = self._pixels(np.array([fact.object for fact in batch.pictured], np.int64), generator)
        views = augment_emoji(torch.cat([drawings, drawings]), generator, self.strength)
        return batch._replace(views=corner_neighbour(views, generator))

    def sample_facts(self, rng: np.random.Generator, choose: ObjectChooser | None = None) -> FactBatch:
        """A batch whose views are empty, [0, 3, 0, 0]; `choose` replaces this sampler's choice of objects."""
        return _concatenate([self._sample_set(rng, size, choose) for size in self.sizes])

    def _sample_set(self, rng: np.random.Generator, count: int, choose: ObjectChooser | None) -> FactBatch:
        text_count = round(count * TEXT_SHARE)
        captions = self.emoji.captions
        pictured_objects, text_objects = (choose or self._objects)(rng, count - text_count, text_count)
        pictured = sample_facts(rng, pictured_objects.tolist(), captions, True, PAIRED_SHARE)
        text_only = sample_facts(rng, text_objects.tolist(), captions, False, PAIRED_SHARE)
        # Facts about one object share a memory, where they can be mistaken for each other.
        about = np.unique([fact.object for fact in (*pictured, *text_only)], return_inverse=True)[1]
        memories = min(int(rng.choice(MEMORY_COUNTS)), about.max() + 1)
        group = rng.permutation(np.arange(about.max() + 1) % memories)[about]
        is_written = rng.random(len(about)) >= UNWRITTEN_SHARE
        # No memory is empty.
        is_written[[np.flatnonzero(group == number)[0] for number in range(memories)]] = True
        return FactBatch(pictured, text_only, torch.empty(0, 3, 0, 0), group, is_written)

    def _objects(
        self, rng: np.random.Generator, pictured_count: int, text_count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Objects of the facts with a picture, and emoji for the facts in words alone."""
        runs = bool(rng.random() < RUN_SHARE)
        others = 0 if self.drawings is None else int(rng.binomial(pictured_count, self.drawing_share))
        objects = _sample_rows(rng, self.rows, pictured_count - others + text_count, runs)
        pictured, text_only = objects[: pictured_count - others], objects[pictured_count - others :]
        if self.drawings is not None:
            drawing_objects = len(self.emoji.captions) + np.arange(len(self.drawings))
            drawn = _sample_rows(rng, drawing_objects, others, runs)
            pictured = rng.permutation(np.concatenate([pictured, drawn]))
        return pictured, text_only

    def _pixels(self, objects: np.ndarray, generator: torch.Generator) -> Tensor:
        """uint8 [n, S, S, 4]. Every object has one drawing: both views of a fact, and all facts about an object, show
        the same vendor's.
        """
        own, place = np.unique(objects, return_inverse=True)
        rows = own[own < len(self.emoji.captions)]
        pixels = self.sampler.pixels(rows, self.sampler.vendors_of(rows, generator))
        if self.drawings is not None:
            rest = self.drawings[own[len(rows) :] - len(self.emoji.captions)]
            pixels = torch.cat([pixels, torch.from_numpy(rest)])
        return pixels[torch.from_numpy(place)]


def _concatenate(sets: list[FactBatch]) -> FactBatch:
    """Several sets as one batch; no memory holds facts of two sets."""
    if len(sets) == 1:
        return sets[0]
    first_memory = np.cumsum([0, *(batch.group.max() + 1 for batch in sets)])
    splits = [len(batch.pictured) for batch in sets]
    groups = [batch.group + first for batch, first in zip(sets, first_memory, strict=False)]
    group, is_written = (
        np.concatenate(
            [part[:split] for part, split in zip(parts, splits, strict=True)]
            + [part[split:] for part, split in zip(parts, splits, strict=True)]
        )
        for parts in (groups, [batch.is_written for batch in sets])
    )
    pictured = [fact for batch in sets for fact in batch.pictured]
    text_only = [fact for batch in sets for fact in batch.text_only]
    return FactBatch(pictured, text_only, sets[0].views, group, is_written)


def _sample_rows(rng: np.random.Generator, rows: np.ndarray, count: int, runs: bool) -> np.ndarray:
    """`count` of `rows` in random order.

    runs : sample runs of consecutive rows, which resemble each other; an object occurs twice where two runs overlap.
    """
    if not runs:
        return rng.choice(rows, count, replace=count > len(rows))
    starts = rng.choice(len(rows), -(-count // RUN_LENGTH), replace=count > len(rows))
    places = (starts[:, None] + np.arange(RUN_LENGTH)).ravel()[:count] % len(rows)
    return rng.permutation(rows[places])
