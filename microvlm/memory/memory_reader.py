"""Reads a memory file of any format. What it holds is checked before it is believed, however right its hashes are."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from microvlm.atomic import real_file
from microvlm.console import describe_os_error
from microvlm.errors import UserError
from microvlm.memory.appended_file import ENDING_BYTES, AppendedFile
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.log_rows import OPTIONAL_ARRAYS, entries_of, parse_numbers, parse_rows
from microvlm.memory.record_chain import RecordReader
from microvlm.memory.tensor_blob import (
    OPTIONAL_TENSORS,
    TENSORS,
    Blob,
    metadata_of,
    read_header,
    read_tensors,
)
from microvlm.runtime import MemoryArrays

MEMORY_FORMAT = 4
RECORDS_FORMAT = 3
"""The first format with records."""
LONGEST = 1e6
"""Latents and keys have lengths near 1, and means and covariances follow them; a longer array is no memory's."""
HASHED_METADATA = ("format", "fingerprint", "log", "forgotten", "rows")
_LONGEST_FINGERPRINT = 64


class FileContent(NamedTuple):
    """What a memory file holds."""

    memory: EpisodicMemory
    """Rows that are in no state of the file are pending."""
    fingerprint: str
    """Of the model that wrote the file."""
    file: AppendedFile | None
    """The file, if a record may be appended to it; None for an older format and behind a torn record."""
    is_torn: bool
    """Whether a torn record was left out."""


def read_content(path: Path) -> FileContent:
    """Read a memory file. Raises UserError for a missing, damaged or newer one."""
    try:
        with real_file(path).open("rb") as file:
            return _read(file, path)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; give a memory file, as microvlm chat --memory or memory write makes it."
        ) from None
    except OSError as error:
        raise UserError(describe_os_error(error)) from None
    except (ValueError, KeyError):
        raise UserError(f"{path} is damaged or no memory file; use a copy of it, or another file.") from None


def digest_of(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """One sha256 over names, dtypes, shapes and bytes of the tensors, and the metadata but their own hash."""
    digest = hashlib.sha256()
    for name in (*TENSORS, *(name for name in OPTIONAL_TENSORS if name in tensors)):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
    hashed = {key: metadata[key] for key in HASHED_METADATA if key in metadata}
    digest.update(json.dumps(hashed, sort_keys=True).encode())
    return digest.digest()


def check_numbers(*arrays: np.ndarray) -> None:
    """Raise ValueError unless all numbers of the float32 arrays are finite and such as a memory has."""
    for array in arrays:
        # The square of an array's length; a comparison with NaN is false.
        if not np.vdot(array, array) <= LONGEST**2:
            raise ValueError("numbers that no memory has")


def _read(file: BinaryIO, path: Path) -> FileContent:
    """The content of an open file.

    Raises ValueError or KeyError for a damaged one, and UserError where more can be said.
    """
    status = os.fstat(file.fileno())
    base = _read_base(file, status.st_size, path)
    file_format, fingerprint = base.metadata["format"], base.metadata.get("fingerprint", "")
    if len(fingerprint) > _LONGEST_FINGERPRINT:
        raise ValueError("a longer fingerprint than a model has")
    parts = _Parts(base, path)
    records = RecordReader(file, base.size, status.st_size, bytes.fromhex(base.metadata["sha256"]))
    if int(file_format) >= RECORDS_FORMAT:
        for content in records:
            parts.add_record(content)
    if records.end < status.st_size and not records.is_torn:
        raise ValueError("bytes behind the end")
    parts.check_count(int(base.metadata.get("rows", 0)))
    appendable = None
    if int(file_format) == MEMORY_FORMAT and not records.is_torn:
        file.seek(status.st_size - ENDING_BYTES)
        place = (status.st_dev, status.st_ino)
        appendable = AppendedFile(
            real_file(path), place, status.st_size, records.digest, file.read(ENDING_BYTES)
        )
    return FileContent(parts.memory(), fingerprint, appendable, records.is_torn)


def _read_base(file: BinaryIO, size: int, path: Path) -> Blob:
    """The first blob of a file, whose hash is right. Raises ValueError, and UserError for a newer format."""
    header = read_header(file, size)
    metadata = metadata_of(header)
    file_format = metadata.get("format", "")
    if not (file_format.isascii() and file_format.isdigit() and len(file_format) < 9):
        raise ValueError("no format")
    if int(file_format) > MEMORY_FORMAT:
        raise UserError(f"{path} was written by a newer microvlm; upgrade the package.")
    base = read_tensors(file, header, size - file.tell())
    if base.tensors.keys() - {*OPTIONAL_TENSORS} != {*TENSORS}:
        raise ValueError("other tensors than a memory's")
    if digest_of(base.tensors, metadata).hex() != metadata.get("sha256"):
        raise ValueError("a hash is wrong")
    return base


class _Parts:
    """States and rows of a file, put together from its first blob and its records."""

    def __init__(self, base: Blob, path: Path):
        self._path = path
        means, covariances = base.tensors["memory_mean"], base.tensors["memory_cov"]
        if base.metadata["format"] == "1":
            means, covariances = means[None], covariances[None]
        self._slots, self._width = means.shape[1:]
        self._states: list[MemoryArrays | None] = list(self._arrays(means, covariances))
        self._forgotten = (
            [0] if base.metadata["format"] == "1" else parse_numbers(base.metadata["forgotten"], self._path)
        )
        if not self._states or len(self._forgotten) != len(self._states):
            raise ValueError("numbers of states differ")
        self._entries: list[Entry] = []
        self._pending: list[list[int]] = [[] for _ in self._states]
        for entry in self._rows(base):
            if entry.memory >= len(self._states):
                raise ValueError("a row of a state that is not there")
            self._entries.append(entry)

    def add_record(self, content: bytes) -> None:
        """Add the rows of a record, and the states that it has. Raises ValueError and UserError."""
        file = io.BytesIO(content)
        header = read_header(file, len(content))
        blob = read_tensors(file, header, len(content) - file.tell())
        if blob.size != len(content):
            raise ValueError("a record is longer than its tensors")
        for entry in self._rows(blob):
            if entry.memory > len(self._states):
                raise ValueError("a row of a state that is not there")
            if entry.memory == len(self._states):
                self._states.append(None)
                self._forgotten.append(0)
                self._pending.append([])
            self._pending[entry.memory].append(len(self._entries))
            self._entries.append(entry)
        if "states" not in blob.metadata:
            return
        numbers = parse_numbers(blob.metadata["states"], self._path)
        states = self._arrays(blob.tensors["memory_mean"], blob.tensors["memory_cov"])
        for number, state in zip(numbers, states, strict=True):
            if number >= len(self._states):
                raise ValueError("a state without rows")
            self._states[number], self._pending[number] = state, []

    def check_count(self, count: int) -> None:
        """Raise ValueError for fewer rows than the `count` that the file was written with."""
        if len(self._entries) < count:
            raise ValueError("a file that was written at once was cut")

    def memory(self) -> EpisodicMemory:
        """The memory, all of whose rows outside of its states are pending."""
        pending = sorted(row for rows in self._pending for row in rows)
        return EpisodicMemory(self._states, self._entries, self._forgotten, pending)

    def _arrays(self, means: np.ndarray, covariances: np.ndarray) -> list[MemoryArrays]:
        """States from their stacked arrays. Raises ValueError for other sizes, and numbers that no memory has."""
        count = len(means)
        if means.shape != (count, self._slots, self._width) or not self._slots * self._width:
            raise ValueError("means of another size")
        if covariances.shape != (count, self._slots, self._slots):
            raise ValueError("covariances of another size")
        check_numbers(means, covariances)
        return [MemoryArrays(means[i : i + 1], covariances[i : i + 1]) for i in range(count)]

    def _rows(self, blob: Blob) -> list[Entry]:
        """The rows of a blob. Raises ValueError, and UserError that names what is wrong in the log."""
        keys, latents = blob.tensors["log_keys"], blob.tensors["log_codes"]
        parts = {field: blob.tensors[name] for name, field in OPTIONAL_ARRAYS.items() if name in blob.tensors}
        rows = parse_rows(blob.metadata["log"], self._path)
        if (keys.shape, latents.shape) != ((len(rows), self._slots), (len(rows), self._width)):
            raise ValueError("rows of another size")
        if any(part.shape != (latents if name == "cue" else keys).shape for name, part in parts.items()):
            raise ValueError("rows of another size")
        check_numbers(keys, latents, *parts.values())
        return entries_of(rows, keys, latents, parts)
