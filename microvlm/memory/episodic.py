"""An episodic memory with a log of its rows: write, forget, overwrite and rebuild, over as many states as needed.

Works on keys and latents with any `Runtime`, in the backend's own buffers where it has them; knows no text, image or
file. One state takes as many rows as it has slots; the next row opens another state, and `state_choice` picks the state
that answers a key. A full state no longer changes, and gives its buffers back.

A memory from a file may have rows that its states lack (`pending`): the runtime that will read it writes them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from microvlm.errors import UserError
from microvlm.memory.in_place import HeldMemory, hold
from microvlm.memory.row_counts import RowCounts
from microvlm.runtime import MemoryArrays, Runtime

MAX_TEXT = 1_000_000
"""Characters of a row's text, and of its question."""


@dataclass(frozen=True, slots=True)
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
    value_start: int | None = None
    """Where the answer to the question begins in `text`, which ends with it; None in older files."""
    told: bool = True
    """Whether the row is a fact that somebody told, not an answer of the model in a conversation."""
    cue: np.ndarray | None = None
    """Latent of the question, float32 [C]; None in older files."""
    picture_key: np.ndarray | None = None
    """Key of the image alone, float32 [K]; None without one, and in older files."""
    question_key: np.ndarray | None = None
    """Key of the words alone, float32 [K]; None in older files."""

    @property
    def value(self) -> str:
        """The answer to the question: what is said when a reading points at this row.

        Of an older row it is what follows the logged question in the text, or else the whole text.
        """
        if self.value_start is not None:
            return self.text[self.value_start :]
        _, question, after = self.text.partition(f"{self.question} ")
        return after if question and self.question is not None else self.text

    @property
    def row(self) -> tuple[np.ndarray, np.ndarray]:
        """Key and latent with a batch axis: (w [1, K], z [1, C])."""
        return self.key[None], self.latent[None]


class EpisodicMemory:
    """States, batch 1 each, and the log of the rows in them, oldest first."""

    def __init__(
        self,
        states: Sequence[MemoryArrays | None],
        entries: list[Entry],
        forgotten: list[int] | None = None,
        pending: Sequence[int] = (),
    ):
        """`pending` are the rows, oldest first, that are not in their states yet; a state of None starts empty."""
        self._states: list[MemoryArrays | HeldMemory | None] = list(states)
        self._holder: Runtime | None = None
        self._counts = RowCounts()
        self.entries = entries
        self.forgotten = [0] * len(states) if forgotten is None else forgotten
        """Per state, how many rows were forgotten since it was built. A state is rebuilt after K of them, because
        each row that a full memory forgets adds rounding errors."""
        self.pending = list(pending)
        self.log_arrays: object = None
        """What `pointing.log_arrays` keeps of the log; None before the first question."""
        self.stored: object = None
        """What `memory_file` remembers of the file that has this memory but for rows written since; None where that
        file must be written anew."""

    @classmethod
    def empty(cls, runtime: Runtime) -> EpisodicMemory:
        """A memory without rows: the model's prior."""
        return cls([runtime.memory_prior()], [])

    @property
    def states(self) -> list[MemoryArrays]:
        """The current states, not copies: a later operation may change the arrays.

        Raises RuntimeError while rows are pending.
        """
        if self.pending:
            raise RuntimeError("rows are pending: call write_pending with the model's runtime first")
        return [self.state(number) for number in range(len(self._states))]

    @property
    def state_count(self) -> int:
        """The number of states."""
        return len(self._states)

    @property
    def slots(self) -> int:
        """K, the rows that one state takes."""
        return self.state(0).mean.shape[1]

    @property
    def width(self) -> int:
        """C, the numbers of a latent."""
        return self.state(0).mean.shape[2]

    @property
    def image_count(self) -> int:
        """The number of rows that are images of a conversation."""
        return self._current_counts().images

    def state(self, number: int) -> MemoryArrays:
        """State `number` without its pending rows. Raises RuntimeError for a state that has no other rows."""
        state = self._states[number]
        if state is None:
            raise RuntimeError(f"state {number} has only pending rows")
        return _arrays(state)

    def is_full(self, number: int) -> bool:
        """Whether state `number` has as many rows as slots."""
        return self._current_counts().rows.get(number, 0) >= self.slots

    def rows_of(self, number: int) -> list[int]:
        """Indices of the rows of state `number`, oldest first."""
        return [index for index, entry in enumerate(self.entries) if entry.memory == number]

    def write_pending(self, runtime: Runtime) -> None:
        """Write the rows that the states lack, in the order in which they were logged."""
        pending, self.pending = self.pending, []
        done = 0
        try:
            for index in pending:
                entry = self.entries[index]
                self._held(runtime, entry.memory).write(*entry.row)
                done += 1
        finally:
            self.pending = pending[done:]
        for number in {self.entries[index].memory for index in pending}:
            self._release_if_full(number)

    def write(self, runtime: Runtime, entry: Entry) -> Entry:
        """Write one row into the first state that has room -> the entry as it was logged. Raises UserError."""
        check_entry(entry)
        self.write_pending(runtime)
        entry = dataclasses.replace(entry, memory=self._state_with_room(runtime))
        self._held(runtime, entry.memory).write(*entry.row)
        counts = self._current_counts()
        self.entries.append(entry)
        counts.add(entry, self.entries)
        self._release_if_full(entry.memory)
        return entry

    def forget(self, runtime: Runtime, index: int) -> Entry:
        """Remove row `index` from the log and from its state, as if it had never been written. Raises IndexError."""
        entry = self.entries[index]
        self.write_pending(runtime)
        self.stored = None
        self._held(runtime, entry.memory).forget(*entry.row)
        del self.entries[index]
        self._count_forgotten(runtime, entry.memory)
        return entry

    def overwrite(self, runtime: Runtime, index: int, entry: Entry) -> Entry:
        """Replace row `index` by `entry`, in the same state and at the same place of the log. Raises UserError."""
        check_entry(entry)
        old = self.entries[index]
        self.write_pending(runtime)
        self.stored = None
        entry = dataclasses.replace(entry, memory=old.memory)
        self._held(runtime, old.memory).overwrite(*old.row, *entry.row)
        self.entries[index] = entry
        self._count_forgotten(runtime, entry.memory)
        self._release_if_full(entry.memory)
        return entry

    def rebuild(self, runtime: Runtime) -> float:
        """Write all rows of the log into empty states, which removes the rounding errors of forgotten rows.

        Returns the drift: the largest change of a mean.
        """
        self.write_pending(runtime)
        self.stored = None
        before = [state.mean.copy() for state in self.states]
        for number in range(len(before)):
            self._rebuild_state(runtime, number)
            self._release_if_full(number)
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
        number = next((n for n in range(len(self._states)) if not self.is_full(n)), len(self._states))
        if number == len(self._states):
            self._states.append(runtime.memory_prior())
            self.forgotten.append(0)
        return number

    def _current_counts(self) -> RowCounts:
        if not self._counts.are_of(self.entries):
            self._counts = RowCounts.of(self.entries)
        return self._counts

    def _release_if_full(self, number: int) -> None:
        """Keep the present arrays of a full state, and not the buffers in which a backend would change them."""
        if self.is_full(number):
            self._states[number] = MemoryArrays(*self.state(number))

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
            self._states = [
                None if state is None else MemoryArrays(*_arrays(state)) for state in self._states
            ]
            self._holder = runtime
        state = self._states[number]
        if state is None:
            state = self._states[number] = runtime.memory_prior()
        if isinstance(state, MemoryArrays):
            state = self._states[number] = hold(runtime, state)
        return state


def check_entry(entry: Entry) -> None:
    """Raise UserError for a row that no memory can hold: numbers that are not finite, or a text without measure."""
    if not all(np.isfinite(array).all() for array in arrays_of(entry)):
        raise UserError(
            "the model made numbers of this that are not finite, so nothing was written; get the model again."
        )
    if max(len(encodable(text)) for text in (entry.text, entry.question or "")) > MAX_TEXT:
        raise UserError(f"the text has more than {MAX_TEXT:,} characters; nothing was written: shorten it.")


def arrays_of(entry: Entry) -> list[np.ndarray]:
    """The arrays that an entry has."""
    arrays = (entry.key, entry.latent, entry.cue, entry.picture_key, entry.question_key)
    return [array for array in arrays if array is not None]


def encodable(text: str) -> str:
    """The text as a file has it: half a character, such as a byte of a file's name that is no text, is its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def _arrays(state: MemoryArrays | HeldMemory) -> MemoryArrays:
    return state if isinstance(state, MemoryArrays) else state.state
