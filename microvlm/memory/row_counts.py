"""Rows by state and images of a log, counted once and kept up to date, so that a turn does not read the whole log."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from microvlm.memory.episodic import Entry


class RowCounts:
    """Counts of one log, as long as it is the log that they were made of."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        """Rows by the index of their state."""
        self.images = 0
        """Rows that are images of a conversation."""
        self._length = 0
        self._last: Entry | None = None

    @classmethod
    def of(cls, entries: list[Entry]) -> RowCounts:
        """Count a whole log."""
        counts = cls()
        for entry in entries:
            counts.add(entry, entries)
        return counts

    def add(self, entry: Entry, entries: list[Entry]) -> None:
        """Count `entry`; `entries` is the log that ends with all that is counted."""
        self.rows[entry.memory] = self.rows.get(entry.memory, 0) + 1
        self.images += entry.image
        self._length, self._last = len(entries), entries[-1]

    def are_of(self, entries: list[Entry]) -> bool:
        """Whether these are the counts of a log, as far as its length and its last entry say."""
        return self._length == len(entries) and self._last is (entries[-1] if entries else None)
