"""The endless order in which samples of several data sets are trained on: a function of seed and position alone.

Nothing is remembered between positions, so a resumed run, and any worker process, reads the samples of an unbroken
one. Shares come from blocks of `BLOCK` positions, each of which holds every source as often as its weight says, in an
order of its own. Within a source every epoch shuffles the shards, takes them in groups of `GROUP`, and shuffles the
samples of a group: data larger than memory is read group by group, not from all over the disk.

The memory that a `Mixture` needs beside its sources: 8 bytes a shard and epoch, and 8 bytes a sample of two groups.
For 12 million samples in shards of 1,000 that is .1 + .25 MB a source.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from microvlm.errors import UserError
from microvlm.training.data.caption_data import CaptionData, CaptionSample

BLOCK = 4096
"""Positions of a block. A source's share of it is its weight to within 1/8192, and at least 1/4096."""
GROUP = 16
"""Shards whose samples are shuffled together."""


class Mixture:
    """Samples of several data sets, mixed by weight, for ever."""

    def __init__(self, sources: Sequence[tuple[CaptionData, float]], seed: int, split: str = "train"):
        """`sources`: data sets and their weights, which need not add up to 1.

        Raises UserError for an empty split, and for weights that are not positive.
        """
        if not 0 < len(sources) <= BLOCK:
            raise UserError(f"a mixture needs 1 to {BLOCK} data sets, not {len(sources)}.")
        for data, weight in sources:
            if not (0 < weight < float("inf")):
                raise UserError(f"the weight of {data.folder} is {weight}; give a number above 0.")
            if not data.count(split):
                raise UserError(
                    f"{data.folder} has no samples to {'train on' if split == 'train' else 'use'} "
                    f"(split {split}); build it again with other shares."
                )
        self.sources = [data for data, _ in sources]
        self.seed, self.split = seed, split
        self.quotas = _quotas(np.array([weight for _, weight in sources], dtype=np.float64))
        self._orders = [
            EpochOrder(data.shard_sizes(split), (seed, number)) for number, data in enumerate(self.sources)
        ]
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def epoch_length(self) -> int:
        """Positions that hold as many samples as all sources together."""
        return sum(order.count for order in self._orders)

    def place(self, position: int) -> tuple[int, int]:
        """The number of the source, and of the sample in its split, at a position from 0."""
        if position < 0:
            raise IndexError(f"position {position}")
        block, offset = divmod(position, BLOCK)
        if self._block is None or self._block[0] != block:
            self._block = (block, *self._draw_block(block))
        _, labels, ranks = self._block
        source = int(labels[offset])
        return source, self._orders[source].sample_number(
            block * int(self.quotas[source]) + int(ranks[offset])
        )

    def sample(self, position: int) -> CaptionSample:
        """Read the sample at a position from 0."""
        source, index = self.place(position)
        return self.sources[source].sample(self.split, index)

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [BLOCK] each: a position's source, and how many positions before it in the block have the same."""
        labels = np.repeat(np.arange(len(self.quotas)), self.quotas)
        if len(self.quotas) > 1:
            labels = labels[permutation(BLOCK, self.seed, -1, block)]
        ranks = np.empty(BLOCK, dtype=np.int64)
        for source, quota in enumerate(self.quotas):
            ranks[labels == source] = np.arange(quota)
        return labels, ranks


class EpochOrder:
    """The order of one source's samples over its epochs: each epoch visits every sample once."""

    def __init__(self, shard_sizes: np.ndarray, key: tuple[int, int]):
        """`shard_sizes`: int64 [S], samples of each shard. `key` seeds the order."""
        self.count = int(shard_sizes.sum())
        self._sizes, self._key = shard_sizes, key
        self._first = np.cumsum(shard_sizes) - shard_sizes
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._groups: dict[tuple[int, int], np.ndarray] = {}

    def sample_number(self, draw: int) -> int:
        """The number of the sample that is the source's `draw`-th, from 0."""
        epoch, rank = divmod(draw, self.count)
        if self._epoch is None or self._epoch[0] != epoch:
            shards = permutation(len(self._sizes), *self._key, epoch)
            sizes = np.add.reduceat(self._sizes[shards], np.arange(0, len(shards), GROUP))
            self._epoch = (epoch, shards, np.concatenate([[0], np.cumsum(sizes)]))
        _, shards, starts = self._epoch
        group = int(np.searchsorted(starts, rank, side="right")) - 1
        return int(self._group(epoch, group, shards)[rank - int(starts[group])])

    def _group(self, epoch: int, group: int, shards: np.ndarray) -> np.ndarray:
        """The numbers of a group's samples in their order. The last two groups are kept."""
        numbers = self._groups.get((epoch, group))
        if numbers is None:
            members = shards[group * GROUP : (group + 1) * GROUP]
            in_order = np.concatenate([np.arange(self._sizes[s]) + self._first[s] for s in members])
            numbers = in_order[permutation(len(in_order), *self._key, epoch, group)]
            while len(self._groups) > 1:
                del self._groups[next(iter(self._groups))]
            self._groups[epoch, group] = numbers
        return numbers


def permutation(length: int, *key: int) -> np.ndarray:
    """int64 [length]: a random order, the same for the same key on every machine and with every version of NumPy.

    NumPy keeps the raw numbers of its bit generators, and not its `permutation`, the same over versions.
    """
    seed = np.random.SeedSequence([part % 2**64 for part in key])
    return np.argsort(np.random.Philox(seed).random_raw(length), kind="stable")


def _quotas(weights: np.ndarray) -> np.ndarray:
    """int64 [sources]: how many of a block's positions each source has, by largest remainder and at least 1."""
    exact = weights / weights.sum() * BLOCK
    quotas = np.maximum(1, np.floor(exact)).astype(np.int64)
    while quotas.sum() != BLOCK:
        step = 1 if quotas.sum() < BLOCK else -1
        distance = (exact - quotas) * step
        if step < 0:
            distance[quotas == 1] = -np.inf
        quotas[int(np.argmax(distance))] += step
    return quotas
