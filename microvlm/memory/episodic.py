"""An episodic memory with the log of its rows: write, forget, overwrite, rebuild, over as many states as are needed.

Works on keys and codes, on any `Runtime`, in its own buffers where it holds states; knows no text, no picture and no
file. One state takes as many rows as it has slots; a row beyond that opens another, and `hierarchy` says which one
answers a key.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from microvlm.memory.in_place import HeldMemory, hold
from microvlm.runtime import MemoryArrays, Runtime


@dataclass(frozen=True)
class Entry:
    """One row that was written."""

    text: str
    key: np.ndarray
    """w, float32 [K]."""
    code: np.ndarray
    """z, float32 [C]."""
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""
    image: bool = False
    """Whether the row is a picture's, found again by its place."""
    memory: int = 0
    """Which of the states holds it."""
    question: str | None = None
    """The words that the key encodes; None where they are not known, as in a file from before they were logged."""
    picture: str = ""
    """`Asked.picture` of the picture that the key encodes; empty without one."""

    @property
    def row(self) -> tuple[np.ndarray, np.ndarray]:
        """(w [1, K], z [1, C])."""
        return self.key[None], self.code[None]


class EpisodicMemory:
    """States, batch 1 each, and the rows that are in them, oldest first."""

    def __init__(
        self, states: Sequence[MemoryArrays], entries: list[Entry], forgotten: list[int] | None = None
    ):
        self._kept: list[MemoryArrays | HeldMemory] = list(states)
        self._holder: Runtime | None = None
        self.entries = entries
        self.forgotten = [0] * len(states) if forgotten is None else forgotten
        """Of each state, how many rows were forgotten since it was built. After K it is built anew: each forgotten
        row of a full memory adds rounding errors, and a write for each is what the cure costs."""

    @classmethod
    def empty(cls, runtime: Runtime) -> EpisodicMemory:
        """The prior of the model."""
        return cls([runtime.memory_prior()], [])

    @property
    def states(self) -> list[MemoryArrays]:
        """As they are now, not copied: a later operation may change the arrays."""
        return [kept if isinstance(kept, MemoryArrays) else kept.state for kept in self._kept]

    @property
    def slots(self) -> int:
        """K, of one state."""
        return self.states[0].mean.shape[1]

    def write(self, runtime: Runtime, entry: Entry) -> Entry:
        """Write one row into the first state that has room, and into the log; the entry as it was logged."""
        entry = dataclasses.replace(entry, memory=self._with_room(runtime))
        self._held(runtime, entry.memory).write(*entry.row)
        self.entries.append(entry)
        return entry

    def forget(self, runtime: Runtime, index: int) -> Entry:
        """Take row `index` of the log out of its state, as if it had never been written. Raises IndexError."""
        entry = self.entries[index]
        self._held(runtime, entry.memory).forget(*entry.row)
        del self.entries[index]
        self._count_forgotten(runtime, entry.memory)
        return entry

    def overwrite(self, runtime: Runtime, index: int, entry: Entry) -> Entry:
        """Forget row `index` and write `entry` into the same state and the same place of the log."""
        old = self.entries[index]
        entry = dataclasses.replace(entry, memory=old.memory)
        self._held(runtime, old.memory).overwrite(*old.row, *entry.row)
        self.entries[index] = entry
        self._count_forgotten(runtime, entry.memory)
        return entry

    def rebuild(self, runtime: Runtime) -> float:
        """Write the log anew into empty states, which ends the rounding errors of forgotten rows.

        Returns the largest change of a mean: how far the states had drifted.
        """
        before = [state.mean.copy() for state in self.states]
        for number in range(len(before)):
            self._rebuild_state(runtime, number)
        return max(float(np.abs(old - new.mean).max()) for old, new in zip(before, self.states, strict=True))

    def asked(
        self, question: str, picture: str, before: int | None = None, read: Callable[[str], str] = str
    ) -> int | None:
        """The newest row of the log, or of those before row `before`, written under these words and this picture.

        `read`: how the model reads words (`Processor.fold`); older files have them as they were typed.
        """
        for index in reversed(range(len(self.entries))[:before]):
            entry = self.entries[index]
            if entry.question is not None and (read(entry.question), entry.picture) == (question, picture):
                return index
        return None

    def nearest(self, key: np.ndarray, rows: Sequence[int] | None = None) -> tuple[int, float]:
        """Row of the log whose key points most in the direction of `key` [K], the newest of equals, and the cosine.

        Of all rows, or of those in `rows`, oldest first. (-1, 0) when there is none.
        """
        rows = range(len(self.entries)) if rows is None else rows
        if not rows:
            return -1, 0.0
        keys = np.stack([self.entries[row].key for row in rows])
        lengths = np.linalg.norm(keys, axis=1) * np.linalg.norm(key)
        cosines = keys @ key / np.maximum(lengths, np.finfo(np.float32).tiny)
        index = len(cosines) - 1 - int(cosines[::-1].argmax())
        return rows[index], float(cosines[index])

    def _with_room(self, runtime: Runtime) -> int:
        """The first state with fewer rows than slots; a new one when all are full."""
        rows = np.bincount([entry.memory for entry in self.entries], minlength=len(self._kept))
        free = np.flatnonzero(rows < self.slots)
        if len(free):
            return int(free[0])
        self._kept.append(runtime.memory_prior())
        self.forgotten.append(0)
        return len(self._kept) - 1

    def _count_forgotten(self, runtime: Runtime, number: int) -> None:
        self.forgotten[number] += 1
        if self.forgotten[number] >= self.slots:
            self._rebuild_state(runtime, number)

    def _rebuild_state(self, runtime: Runtime, number: int) -> None:
        self._kept[number], self.forgotten[number] = runtime.memory_prior(), 0
        for entry in self.entries:
            if entry.memory == number:
                self._held(runtime, number).write(*entry.row)

    def _held(self, runtime: Runtime, number: int) -> HeldMemory:
        """State `number` where `runtime` changes it in place. A runtime takes over what another held."""
        if self._holder is not runtime:
            self._kept = [MemoryArrays(*state) for state in self.states]
            self._holder = runtime
        kept = self._kept[number]
        if isinstance(kept, MemoryArrays):
            kept = self._kept[number] = hold(runtime, kept)
        return kept
