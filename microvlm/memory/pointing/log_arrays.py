"""A memory's log as arrays that grow with it: thousands of rows are not stacked anew for each question."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.log_rows import known_arrays
from microvlm.memory.pointing.evidence import Rows


class LogArrays:
    """Keeps the arrays of the entries that it was last asked about; those that are still there are not copied again."""

    def __init__(self, slots: int, width: int):
        self._sizes = (slots, width)
        self._entries: list[Entry] = []
        self._arrays = rows_from([], slots, width)

    def rows(self, entries: Sequence[Entry]) -> Rows:
        """The rows of `entries`; views, which the next call may change."""
        kept = next(
            (
                place
                for place, (old, new) in enumerate(zip(self._entries, entries, strict=False))
                if old is not new
            ),
            min(len(self._entries), len(entries)),
        )
        if kept < len(entries):
            added = rows_from(entries[kept:], *self._sizes)
            self._reserve(kept, len(entries))
            for array, part in zip(self._arrays, added, strict=True):
                array[kept : len(entries)] = part
        self._entries = list(entries)
        return Rows(*(array[: len(entries)] for array in self._arrays))

    def _reserve(self, kept: int, count: int) -> None:
        """Room for `count` rows, of which the first `kept` stay."""
        if count <= len(self._arrays.keys):
            return
        larger = [np.zeros((2 * count, *array.shape[1:]), array.dtype) for array in self._arrays]
        for new, old in zip(larger, self._arrays, strict=True):
            new[:kept] = old[:kept]
        self._arrays = Rows(*larger)


def rows_of(memory: EpisodicMemory) -> Rows:
    """The rows of a memory's log."""
    if not isinstance(memory.log_arrays, LogArrays):
        memory.log_arrays = LogArrays(memory.slots, memory.width)
    return memory.log_arrays.rows(memory.entries)


def rows_from(entries: Sequence[Entry], slots: int, width: int) -> Rows:
    """Entries' keys [E, `slots`], latents and cues [E, `width`], and keys of their parts.

    An entry of an older file that is about words alone has their key as its own.
    """
    return Rows(
        known_arrays([entry.key for entry in entries], slots),
        known_arrays([entry.latent for entry in entries], width),
        known_arrays([entry.cue for entry in entries], width),
        known_arrays([entry.picture_key for entry in entries], slots),
        known_arrays([_question_key(entry) for entry in entries], slots),
        np.array([bool(entry.picture) or entry.picture_key is not None for entry in entries], bool),
    )


def _question_key(entry: Entry) -> np.ndarray | None:
    is_words = entry.question is not None and not entry.picture and entry.picture_key is None
    return entry.key if entry.question_key is None and is_words else entry.question_key
