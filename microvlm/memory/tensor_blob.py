"""Blobs of a memory file: safetensors with the tensors of states and rows, read from an open file piece by piece.

Other bytes may follow a blob. Nothing is mapped, so a file that is cut while it is read gives an error and no signal,
and no array is larger than what the file still holds.
"""

from __future__ import annotations

import math
from typing import Annotated, BinaryIO, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta
from safetensors.numpy import save

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Count

TENSORS = ("memory_mean", "memory_cov", "log_keys", "log_codes")
OPTIONAL_TENSORS = ("log_cues", "log_picture_keys", "log_question_keys")
"""Tensors that the blobs of older versions lack."""
HEADER_LIMIT = 100_000_000
"""Bytes of a header; the safetensors library reads no longer one."""
_LENGTH_BYTES = 8


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a tensor lies behind the header."""

    dtype: Literal["F32"]
    shape: Annotated[tuple[Count, ...], Meta(min_length=2, max_length=3)]
    data_offsets: tuple[Count, Count]


class _Metadata(msgspec.Struct, frozen=True):
    metadata: dict[str, str] = msgspec.field(name="__metadata__")


class _Header(_Metadata, frozen=True, forbid_unknown_fields=True):
    memory_mean: TensorEntry | None = None
    memory_cov: TensorEntry | None = None
    log_keys: TensorEntry | None = None
    log_codes: TensorEntry | None = None
    log_cues: TensorEntry | None = None
    log_picture_keys: TensorEntry | None = None
    log_question_keys: TensorEntry | None = None


class Blob(NamedTuple):
    """The content of a blob."""

    metadata: dict[str, str]
    tensors: dict[str, np.ndarray]
    """float32, by their names in `TENSORS` and `OPTIONAL_TENSORS`."""
    size: int
    """Bytes of the blob in the file."""


def encode(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """The blob of some of the tensors. Raises UserError for more text than a header may have."""
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    # Every character of the metadata is ASCII, and at worst escaped by another one.
    if 2 * sum(map(len, metadata.values())) > HEADER_LIMIT - 10_000:
        raise UserError("a text in it is too long; shorten it.")
    return save(arrays, metadata)


def read_header(file: BinaryIO, available: int) -> bytes:
    """Read a blob's header, which is JSON, from the position of `file`, which has `available` more bytes.

    Raises ValueError when it is none.
    """
    length = int.from_bytes(read_exactly(file, _LENGTH_BYTES, available), "little")
    if length > HEADER_LIMIT:
        raise ValueError("a longer header than safetensors allows")
    header = read_exactly(file, length, available - _LENGTH_BYTES)
    if not header.rstrip(b" ").endswith(b"}"):
        raise ValueError("a header that is padded by something else than blanks")
    return header


def metadata_of(header: bytes) -> dict[str, str]:
    """The metadata of a header, whatever tensors it has. Raises ValueError."""
    return _parsed(header, _Metadata).metadata


def read_tensors(file: BinaryIO, header: bytes, available: int) -> Blob:
    """Read the tensors behind a header; `file`, right behind it, has `available` more bytes.

    Raises ValueError unless they are float32 tensors of these names, one behind the other, as the header says.
    """
    fields = _parsed(header, _Header)
    names = (*TENSORS, *OPTIONAL_TENSORS)
    entries = {name: getattr(fields, name) for name in names if getattr(fields, name) is not None}
    tensors, position = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if begin != position or end - begin != 4 * math.prod(entry.shape) or end > available:
            raise ValueError("tensors that do not lie one behind the other")
        tensors[name] = np.empty(entry.shape, "<f4")
        if file.readinto(tensors[name].reshape(-1).view(np.uint8)) != end - begin:  # type: ignore[attr-defined]
            raise ValueError("the file ends within a tensor")
        position = end
    return Blob(fields.metadata, tensors, _LENGTH_BYTES + len(header) + position)


def read_exactly(file: BinaryIO, count: int, available: int) -> bytes:
    """The next `count` bytes. Raises ValueError where the file has fewer."""
    content = file.read(count) if count <= available else b""
    if len(content) != count:
        raise ValueError("the file ends too early")
    return content


def _parsed(header: bytes, kind: type[msgspec.Struct]) -> _Header:
    try:
        return documents.parse(header, kind, "the header", "use a copy of the file")  # type: ignore[return-value]
    except UserError as error:
        raise ValueError(str(error)) from None
