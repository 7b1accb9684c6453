"""An episodic memory with a log of its rows: write, forget, overwrite and rebuild, over as many states as needed.

Works on keys and latents with any `Runtime`, in the backend's own buffers where it has them; knows no text, image or
file. One state takes as many rows as it has slots; the next row opens another state, and `state_choice` picks the state
that answers a key.
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
    """One row of the memory, as it was written."""

    text: str
    """Text of the row, as the log shows it."""
    key: np.ndarray
    """w, float32 [K]."""
    latent: np.ndarray
    """z, float32 [C]."""
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""
    image: bool = False
    """Whether the row is an image of a conversation, written under the question of its place."""
    memory: int = 0
    """Index of the state that holds the row."""
    question: str | None = None
    """The words that the key encodes; None where they are unknown, as in files from before they were logged."""
    picture: str = ""
    """`Query.picture` of the image that the key encodes; empty without one."""

    @property
    def row(self) -> tuple[np.ndarray, np.ndarray]:
        """Key and latent with a batch axis: (w [1, K], z [1, C])."""
        return self.key[None], self.latent[None]


class EpisodicMemory:
    """States, batch 1 each, and the log of the rows in them, oldest first."""

    def __init__(
        self, states: Sequence[MemoryArrays], entries: list[Entry], forgotten: list[int] | None = None
    ):
        self._states: list[MemoryArrays | HeldMemory] = list(states)
        self._holder: Runtime | None = None
        self.entries = entries
        self.forgotten = [0] * len(states) if forgotten is None else forgotten
        """Per state, how many rows were forgotten since it was built. A state is rebuilt after K of them, because
        each row that a full memory forgets adds rounding errors."""

    @classmethod
    def empty(cls, runtime: Runtime) -> EpisodicMemory:
        """A memory without rows: the model's prior."""
        return cls([runtime.memory_prior()], [])

    @property
    def states(self) -> list[MemoryArrays]:
        """The current states, not copies: a later operation may change the arrays."""
        return [state if isinstance(state, MemoryArrays) else state.state for state in self._states]

    @property
    def slots(self) -> int:
        """K, the rows that one state takes."""
        return self.states[0].mean.shape[1]

    def write(self, runtime: Runtime, entry: Entry) -> Entry:
        """Write one row into the first state that has room -> the entry as it was logged."""
        entry = dataclasses.replace(entry, memory=self._state_with_room(runtime))
        self._held(runtime, entry.memory).write(*entry.row)
        self.entries.append(entry)
        return entry

    def forget(self, runtime: Runtime, index: int) -> Entry:
        """Remove row `index` from the log and from its state, as if it had never been written. Raises IndexError."""
        entry = self.entries[index]
        self._held(runtime, entry.memory).forget(*entry.row)
        del self.entries[index]
        self._count_forgotten(runtime, entry.memory)
        return entry

    def overwrite(self, runtime: Runtime, index: int, entry: Entry) -> Entry:
        """Replace row `index` by `entry`, in the same state and at the same place of the log."""
        old = self.entries[index]
        entry = dataclasses.replace(entry, memory=old.memory)
        self._held(runtime, old.memory).overwrite(*old.row, *entry.row)
        self.entries[index] = entry
        self._count_forgotten(runtime, entry.memory)
        return entry

    def rebuild(self, runtime: Runtime) -> float:
        """Write all rows of the log into empty states, which removes the rounding errors of forgotten rows.

        Returns the drift: the largest change of a mean.
        """
        before = [state.mean.copy() for state in self.states]
        for number in range(len(before)):
            self._rebuild_state(runtime, number)
        return max(float(np.abs(old - new.mean).max()) for old, new in zip(before, self.states, strict=True))

    def find(
        self, question: str, picture: str, before: int | None = None, normalize: Callable[[str], str] = str
    ) -> int | None:
        """Index of the newest row, or the newest before row `before`, that was written under this query; or None.

        `normalize` (`Processor.normalize_text`) is applied to the logged words: older files have them as typed.
        """
        for index in reversed(range(len(self.entries))[:before]):
            entry = self.entries[index]
            if entry.question is not None and (normalize(entry.question), entry.picture) == (
                question,
                picture,
            ):
                return index
        return None

    def nearest(self, key: np.ndarray, rows: Sequence[int] | None = None) -> tuple[int, float]:
        """(index of the row whose key has the largest cosine with `key` [K], that cosine); the newest of equals.

        Searches all rows, or those in `rows`, oldest first. (-1, 0) without rows.
        """
        rows = range(len(self.entries)) if rows is None else rows
        if not rows:
            return -1, 0.0
        keys = np.stack([self.entries[row].key for row in rows])
        lengths = np.linalg.norm(keys, axis=1) * np.linalg.norm(key)
        cosines = keys @ key / np.maximum(lengths, np.finfo(np.float32).tiny)
        index = len(cosines) - 1 - int(cosines[::-1].argmax())
        return rows[index], float(cosines[index])

    def _state_with_room(self, runtime: Runtime) -> int:
        """Index of the first state with fewer rows than slots. Adds a state when all are full."""
        rows = np.bincount([entry.memory for entry in self.entries], minlength=len(self._states))
        free = np.flatnonzero(rows < self.slots)
        if len(free):
            return int(free[0])
        self._states.append(runtime.memory_prior())
        self.forgotten.append(0)
        return len(self._states) - 1

    def _count_forgotten(self, runtime: Runtime, number: int) -> None:
        self.forgotten[number] += 1
        if self.forgotten[number] >= self.slots:
            self._rebuild_state(runtime, number)

    def _rebuild_state(self, runtime: Runtime, number: int) -> None:
        self._states[number], self.forgotten[number] = runtime.memory_prior(), 0
        for entry in self.entries:
            if entry.memory == number:
                self._held(runtime, number).write(*entry.row)

    def _held(self, runtime: Runtime, number: int) -> HeldMemory:
        """State `number` as a mutable memory of `runtime`, which takes over states that another runtime held."""
        if self._holder is not runtime:
            self._states = [MemoryArrays(*state) for state in self.states]
            self._holder = runtime
        state = self._states[number]
        if isinstance(state, MemoryArrays):
            state = self._states[number] = hold(runtime, state)
        return state
