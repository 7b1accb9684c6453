"""Memory files: an episodic memory as safetensors, to which later rows are appended. Imports no torch.

A file begins with one blob (`tensor_blob`). Tensors, float32: `memory_mean` [S, K, C] and `memory_cov` [S, K, K] of S
states; `log_keys` [N, K] and `log_codes` [N, C], the keys and latents of the N rows in them, oldest first. Zeros where
unknown, and each left out where none is known: `log_cues` [N, C], the latents of the rows' questions, and
`log_picture_keys` and `log_question_keys` [N, K], the keys of their pictures and of their words alone. Metadata:
`format`; `fingerprint` of the model; `log`, a JSON list with an object a row (`log_rows`); `forgotten`, a JSON list of
the number of rows forgotten in each state since it was built; `sha256` of all this.

Records follow (`record_chain`), each a blob of the rows written since: the tensors that begin with `log_`, and `log`;
and, of the states that these rows filled, `memory_mean`, `memory_cov` and `states`, a JSON list of their indices. A
state that is not full is made of its rows when a model opens the file. So a row costs its own bytes and, once in K
rows, a state of as many bytes as K rows. Everything but a new row writes the whole file anew, without what was
forgotten. Where the texts are too long together for one blob (`LONGEST_LOG`), such a file has the rest of its rows in
records too, each with the states of its rows; the first blob's metadata then has `rows`, the number of all rows, so
that no cut is overlooked.

This is format 4. Format 3 had no keys of pictures and words alone, format 2 had no records, and format 1 had one state,
no dimension S and no `forgotten`. All are read; a row that is added to an older file writes it anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_not
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from microvlm.atomic import os_errors_about, real_file, write_file
from microvlm.console import note
from microvlm.errors import UserError
from microvlm.memory.appended_file import ENDING_BYTES, AppendedFile
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.log_rows import OPTIONAL_ARRAYS, encode_logs, known_arrays
from microvlm.memory.memory_reader import MEMORY_FORMAT, check_numbers, digest_of, read_content
from microvlm.memory.record_chain import record
from microvlm.memory.tensor_blob import encode
from microvlm.runtime import MemoryArrays

if TYPE_CHECKING:
    from microvlm.backends.base import LoadedRuntime

_LOOKS, _BETWEEN_LOOKS_S = 4, 0.05
"""A reader that meets a torn record looks again, because a living writer may be at it."""


class _Stored(NamedTuple):
    """What `EpisodicMemory.stored` is."""

    file: AppendedFile
    fingerprint: str
    entries: list[Entry]
    """The rows in the file."""


def save_memory(memory: EpisodicMemory, path: str | Path, fingerprint: str) -> None:
    """Replace the memory file at `path` or behind its links atomically. Raises UserError.

    `fingerprint` is the model's, 16 hexadecimal digits. Permissions of an old file stay.
    """
    with _saving(path, fingerprint):
        entries = list(memory.entries)
        content, digest = _whole_file(memory, entries, fingerprint)
        real_file(path)  # refuses a device, which `write_file` would write to
        write_file(path, content)
        file = AppendedFile.at(path, len(content), digest, content[-ENDING_BYTES:])
    memory.stored = _Stored(file, fingerprint, entries)


def store_memory(memory: EpisodicMemory, path: str | Path, fingerprint: str) -> None:
    """Bring the memory file at `path` up to date. Raises UserError, and then the file is as before.

    New rows are appended to the file that the memory was loaded from or stored in, if it is as it was then. Otherwise,
    and after anything else than new rows, the file is replaced as by `save_memory`.
    """
    with _saving(path, fingerprint):
        has_appended = _append_rows(memory, path, fingerprint)
    if not has_appended:
        save_memory(memory, path, fingerprint)


def load_memory(path: str | Path, fingerprint: str) -> EpisodicMemory:
    """The memory in a file of the model with `fingerprint`; some of its rows may be pending.

    Raises UserError for a missing, damaged or newer file, and for another model's.
    """
    memory, file_fingerprint = read_memory(path)
    if file_fingerprint != fingerprint:
        raise UserError(
            f"{path} was written by another model; give the model that wrote it, or another file."
        )
    return memory


def open_memory(path: str | Path, runtime: LoadedRuntime) -> EpisodicMemory:
    """The memory in a file of the model that `runtime` runs, with all rows in its states.

    Raises UserError as `load_memory`, and for states of other sizes than the model's.
    """
    memory = load_memory(path, runtime.fingerprint)
    slots, width = runtime.config.memory.slots, runtime.config.memory.code_size
    if (memory.slots, memory.width) != (slots, width):
        raise UserError(
            f"{path} is damaged: its states are {memory.slots} x {memory.width} and the model's {slots} x {width}; "
            "use a copy of it, or another file."
        )
    memory.write_pending(runtime)
    return memory


def read_memory(path: str | Path, say: Callable[[str], None] = note) -> tuple[EpisodicMemory, str]:
    """(the memory in a file, the fingerprint of the model that wrote it); some of its rows may be pending.

    `say` gets one sentence when the last record is torn and left out. Raises UserError for a missing, damaged or newer
    file.
    """
    content = read_content(Path(path))
    for _ in range(_LOOKS - 1):
        if not content.is_torn:
            break
        time.sleep(_BETWEEN_LOOKS_S)
        content = read_content(Path(path))
    memory, fingerprint, file, is_torn = content
    if is_torn:
        count = len(memory.entries)
        entries = "1 entry is" if count == 1 else f"{count} entries are"
        say(f"{path}: what was written last is lost, because its writer was cut off; {entries} whole")
    if file is not None:
        memory.stored = _Stored(file, fingerprint, list(memory.entries))
    return memory, fingerprint


def _append_rows(memory: EpisodicMemory, path: str | Path, fingerprint: str) -> bool:
    """Append the rows that the file lacks -> whether that was possible. Raises UserError and ValueError."""
    stored = memory.stored
    if not isinstance(stored, _Stored) or stored.fingerprint != fingerprint:
        return False
    count = len(stored.entries)
    if len(memory.entries) < count or any(map(is_not, stored.entries, memory.entries)):
        return False
    entries = memory.entries[count:]
    (_, log), *further = encode_logs(entries)
    if further:
        return False
    content = _record(memory, entries, log) if entries else None
    with os_errors_about(path):
        file = stored.file.append(path, content)
    if file is None:
        return False
    stored.entries.extend(entries)
    memory.stored = stored._replace(file=file)
    return True


def _whole_file(memory: EpisodicMemory, entries: Sequence[Entry], fingerprint: str) -> tuple[bytes, bytes]:
    """(the bytes of a new file, its digest). Raises ValueError for numbers that no memory has, and UserError."""
    (first, log), *further = encode_logs(entries)
    tensors = _row_tensors(memory, first) | _state_tensors(memory.states)
    metadata = {
        "format": str(MEMORY_FORMAT),
        "fingerprint": fingerprint,
        "log": log,
        "forgotten": json.dumps(memory.forgotten),
    }
    if further:
        metadata["rows"] = str(len(entries))
    digest = digest_of(tensors, metadata)
    parts = [encode(tensors, {**metadata, "sha256": digest.hex()})]
    for rows, log in further:
        # The states have these rows already, which a reader learns from states in the same record.
        numbers = sorted({entry.memory for entry in rows})
        tensors = _row_tensors(memory, rows) | _state_tensors(map(memory.state, numbers))
        part, digest = record(encode(tensors, {"log": log, "states": json.dumps(numbers)}), digest)
        parts.append(part)
    return b"".join(parts), digest


def _record(memory: EpisodicMemory, entries: Sequence[Entry], log: str) -> bytes:
    """The blob of new rows and of the states that they filled. Raises ValueError for numbers that no memory has."""
    numbers = sorted({entry.memory for entry in entries})
    for state in map(memory.state, numbers):
        # A state on another machine is not fetched for this; it is checked when it is full.
        check_numbers(*(part for part in state if isinstance(part, np.ndarray)))
    full = [number for number in numbers if memory.is_full(number)]
    tensors, metadata = _row_tensors(memory, entries), {"log": log}
    if full:
        tensors |= _state_tensors([memory.state(number) for number in full])
        metadata["states"] = json.dumps(full)
    return encode(tensors, metadata)


def _state_tensors(states: Iterable[MemoryArrays]) -> dict[str, np.ndarray]:
    """The stacked states, float32. Raises ValueError for numbers that no memory has."""
    means, covariances = zip(*states, strict=True)
    tensors = {
        "memory_mean": np.concatenate(means, dtype=np.float32, casting="same_kind"),
        "memory_cov": np.concatenate(covariances, dtype=np.float32, casting="same_kind"),
    }
    check_numbers(*tensors.values())
    return tensors


def _row_tensors(memory: EpisodicMemory, entries: Sequence[Entry]) -> dict[str, np.ndarray]:
    """Keys, latents and what else is known of rows, float32. Raises ValueError for numbers that no memory has."""
    tensors = {
        "log_keys": np.array([entry.key for entry in entries], np.float32).reshape(-1, memory.slots),
        "log_codes": np.array([entry.latent for entry in entries], np.float32).reshape(-1, memory.width),
    }
    for name, field in OPTIONAL_ARRAYS.items():
        arrays = [getattr(entry, field) for entry in entries]
        if any(array is not None for array in arrays):
            tensors[name] = known_arrays(arrays, memory.width if field == "cue" else memory.slots)
    check_numbers(*tensors.values())
    return tensors


@contextmanager
def _saving(path: str | Path, fingerprint: str) -> Iterator[None]:
    """Turn what keeps a memory from its file into one sentence."""
    if not fingerprint:
        raise UserError("this bundle has no fingerprint, so no memory can belong to it; export it again.")
    try:
        yield
    except UserError as error:
        raise UserError(f"the memory was not saved: {error}") from None
    except OSError as error:
        raise UserError(f"the memory was not saved: {path} cannot be written: {error.strerror}.") from None
    except ValueError:
        raise UserError(
            f"the memory was not saved: it has numbers that are not finite, so {path} is as before; "
            "get the model again, or 'memory rebuild' the file."
        ) from None
