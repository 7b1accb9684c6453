"""Batches of facts to remember: which objects, which of them in one memory, and two views of each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from microvlm.training.batches.drawing_sampler import DrawingSampler
from microvlm.training.data.emoji import EmojiData
from microvlm.training.data.fact_texts import Fact, deal_facts
from microvlm.training.data.views import augment_emoji, corner_neighbour

DEAL = 82
"""Facts that are dealt together, about as many: what is written of them fills the 64 slots of `nano`."""
GROUP_COUNTS = (1, 1, 1, 2, 2, 4)
"""Into how many memories a deal is dealt: few are full, many hold little."""
UNWRITTEN_SHARE = 0.2
TEXT_SHARE = 0.1
"""Share of the facts that have no picture."""
PAIRED_SHARE = 0.35
"""Of the facts that are about the object of the one before: only the question tells the two apart."""
RUN_SHARE, RUN_LENGTH = 0.5, 4
"""Share of the deals whose objects come in runs of rows that follow each other, which resemble each other."""


Choose = Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray]]
"""(generator, how many are shown, how many are told of) -> objects of each, int64."""


class FactBatch(NamedTuple):
    """Facts with a picture, then facts of words alone."""

    shown: list[Fact]
    told: list[Fact]
    views: Tensor
    """float32 [2 * len(shown), 3, S, S]: as written, then as asked for."""
    group: np.ndarray
    """int64 [F], which memory each fact belongs to."""
    written: np.ndarray
    """bool [F]; the others are asked for all the same."""

    @property
    def facts(self) -> list[Fact]:
        return [*self.shown, *self.told]


class FactDealer:
    """Draws facts about objects: emoji that the training vendors drew (of `rows`, or all that are not held out), and in
    `drawing_share` of the cases other things, which have a picture and no name (`drawings`, uint8 [D, S, S, 4]).

    An object is a row: of an emoji, or behind all emoji that of a drawing.
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
        deals = max(1, round(count / DEAL))
        ends = [count * place // deals for place in range(deals + 1)]
        self.sizes = [end - start for start, end in pairwise(ends)]
        """How many facts each deal of a batch has."""

    def deal(self, rng: np.random.Generator, generator: torch.Generator) -> FactBatch:
        batch = self.facts(rng)
        drawings = self._pixels(np.array([fact.object for fact in batch.shown], np.int64), generator)
        views = augment_emoji(torch.cat([drawings, drawings]), generator, self.strength)
        return batch._replace(views=corner_neighbour(views, generator))

    def facts(self, rng: np.random.Generator, choose: Choose | None = None) -> FactBatch:
        """A batch without views, [0, ...]; `choose` draws its objects in the place of this dealer."""
        return _together([self._deal(rng, size, choose) for size in self.sizes])

    def _deal(self, rng: np.random.Generator, count: int, choose: Choose | None) -> FactBatch:
        told_count = round(count * TEXT_SHARE)
        shown_count = count - told_count
        captions = self.emoji.captions
        pictured, told_of = (choose or self._objects)(rng, shown_count, told_count)
        shown = deal_facts(rng, pictured.tolist(), captions, True, PAIRED_SHARE)
        told = deal_facts(rng, told_of.tolist(), captions, False, PAIRED_SHARE)
        # Facts of one object are in one memory, where they can be mistaken for each other.
        about = np.unique([fact.object for fact in (*shown, *told)], return_inverse=True)[1]
        groups = min(int(rng.choice(GROUP_COUNTS)), about.max() + 1)
        group = rng.permutation(np.arange(about.max() + 1) % groups)[about]
        written = rng.random(len(about)) >= UNWRITTEN_SHARE
        # No memory is empty.
        written[[np.flatnonzero(group == number)[0] for number in range(groups)]] = True
        return FactBatch(shown, told, torch.empty(0, 3, 0, 0), group, written)

    def _objects(self, rng: np.random.Generator, shown: int, told: int) -> tuple[np.ndarray, np.ndarray]:
        """Objects with a picture, and emoji that are told of."""
        runs = bool(rng.random() < RUN_SHARE)
        others = 0 if self.drawings is None else int(rng.binomial(shown, self.drawing_share))
        objects = _drawn(rng, self.rows, shown - others + told, runs)
        pictured, told_of = objects[: shown - others], objects[shown - others :]
        if self.drawings is not None:
            behind = len(self.emoji.captions) + np.arange(len(self.drawings))
            pictured = rng.permutation(np.concatenate([pictured, _drawn(rng, behind, others, runs)]))
        return pictured, told_of

    def _pixels(self, objects: np.ndarray, generator: torch.Generator) -> Tensor:
        """uint8 [n, S, S, 4]. An object is one drawing: both views of a fact, and of two facts about it, are of one
        vendor."""
        own, place = np.unique(objects, return_inverse=True)
        rows = own[own < len(self.emoji.captions)]
        pixels = self.sampler.pixels(rows, self.sampler.vendors_of(rows, generator))
        if self.drawings is not None:
            rest = self.drawings[own[len(rows) :] - len(self.emoji.captions)]
            pixels = torch.cat([pixels, torch.from_numpy(rest)])
        return pixels[torch.from_numpy(place)]


def _together(deals: list[FactBatch]) -> FactBatch:
    """Several deals as one batch; no memory has facts of two."""
    if len(deals) == 1:
        return deals[0]
    behind = np.cumsum([0, *(deal.group.max() + 1 for deal in deals)])
    splits = [len(deal.shown) for deal in deals]
    groups = [deal.group + before for deal, before in zip(deals, behind, strict=False)]
    written = [deal.written for deal in deals]
    group, known = (
        np.concatenate(
            [part[:split] for part, split in zip(parts, splits, strict=True)]
            + [part[split:] for part, split in zip(parts, splits, strict=True)]
        )
        for parts in (groups, written)
    )
    shown, told = ([fact for deal in deals for fact in deal[kind]] for kind in (0, 1))
    return FactBatch(shown, told, deals[0].views, group, known)


def _drawn(rng: np.random.Generator, rows: np.ndarray, count: int, runs: bool) -> np.ndarray:
    """`count` of `rows`, without order; in runs those that follow each other are alike, and where two runs overlap an
    object is drawn twice."""
    if not runs:
        return rng.choice(rows, count, replace=count > len(rows))
    starts = rng.choice(len(rows), -(-count // RUN_LENGTH), replace=count > len(rows))
    places = (starts[:, None] + np.arange(RUN_LENGTH)).ravel()[:count] % len(rows)
    return rng.permutation(rows[places])
