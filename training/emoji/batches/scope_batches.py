"""Samples the batches of `scope` stages: which facts or pictures of a bank each memory holds, and its questions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MEMORIES = 24
"""Memories in a batch."""
SIZES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
"""Facts in a memory, as shares of its slots."""
EPISODE_SHARE = 0.15
"""Share of the memories that hold an episode."""
MAX_QUESTIONS = 24
"""Most questions of one kind about one memory."""


class BankIndex(NamedTuple):
    """Index of a bank for sampling: its sizes, and which of its n facts are the same or alike."""

    names: np.ndarray
    """int64 [n]: equal for facts with the same object and relation."""
    nearest: np.ndarray
    """int64 [n, k]: facts of other names with the most similar questions."""
    pictures: int
    """Pictures that episodes are made of."""
    places: int
    """Places that an episode can be asked about: first, second, ..."""
    strangers: int
    """Questions that no memory answers."""


class MemoryDraw(NamedTuple):
    """One memory and the questions about it, as indices into the bank, int64 each."""

    episode: bool
    """Whether the memory holds an episode; facts otherwise."""
    written_rows: np.ndarray
    """Facts, or pictures in their order."""
    known_rows: np.ndarray
    """Questions that the memory answers: of facts, or places of an episode."""
    unknown: np.ndarray
    """Questions of the same kind that it does not answer."""
    strangers: np.ndarray
    """Questions that no memory answers."""


def sample_memories(rng: np.random.Generator, bank: BankIndex, slots: int) -> list[MemoryDraw]:
    """`MEMORIES` memories of one size."""
    count = max(1, round(slots * float(rng.choice(SIZES))))
    return [
        _sample_episode(rng, bank, count) if rng.random() < EPISODE_SHARE else _sample_facts(rng, bank, count)
        for _ in range(MEMORIES)
    ]


def _sample_facts(rng: np.random.Generator, bank: BankIndex, count: int) -> MemoryDraw:
    """A memory of `count` facts, out of twice as many that are neighbours in the bank or random.

    Unknown questions include ones that resemble written facts: about objects that look alike, and other questions about
    the same object.
    """
    total = len(bank.names)
    start = int(rng.integers(total))
    facts = (start + np.arange(2 * count)) % total if rng.random() < 0.5 else rng.permutation(total)
    facts = rng.permutation(facts[: 2 * count].copy())
    written_rows, others = facts[:count], facts[count:]
    others = others[~np.isin(bank.names[others], bank.names[written_rows])][:MAX_QUESTIONS]
    known_rows = written_rows[:MAX_QUESTIONS]
    alike = bank.nearest[known_rows, rng.integers(bank.nearest.shape[1], size=len(known_rows))]
    unknown = np.concatenate([others, alike[~np.isin(bank.names[alike], bank.names[written_rows])]])
    return MemoryDraw(False, written_rows, known_rows, unknown, _sample_strangers(rng, bank, len(unknown)))


def _sample_episode(rng: np.random.Generator, bank: BankIndex, count: int) -> MemoryDraw:
    """A memory of pictures in their order, asked for by place; some places lie beyond the last picture."""
    length = min(count, bank.places - 1)
    pictures = rng.integers(bank.pictures, size=length)
    places = np.arange(bank.places)
    unknown = places[length:]
    return MemoryDraw(True, pictures, places[:length], unknown, _sample_strangers(rng, bank, len(unknown)))


def _sample_strangers(rng: np.random.Generator, bank: BankIndex, unknown: int) -> np.ndarray:
    """Questions that no memory answers, a quarter as many as `unknown`."""
    return rng.integers(bank.strangers, size=max(1, unknown // 4))
