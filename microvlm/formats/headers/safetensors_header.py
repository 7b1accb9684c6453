"""Reads the header of a safetensors file, typed and bounded, before any of its data. Imports neither numpy nor torch.

The file is the length of the header (8 bytes, little endian), the header (JSON) and the data. The header maps names to
dtype, shape and offsets into the data, and `__metadata__` to texts.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Count, quote

MAX_HEADER_BYTES = 100_000_000
"""The largest header that the safetensors library reads."""
_METADATA = "__metadata__"
ELEMENT_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "C64": 8, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of an element by dtype. Dtypes narrower than a byte are not supported."""


_INTEGERS = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64",
}  # fmt: skip


class _Entry(msgspec.Struct, frozen=True):
    dtype: Annotated[str, Meta(max_length=20)]
    shape: Annotated[tuple[Count, ...], Meta(max_length=16)]
    data_offsets: tuple[Count, Count]


class TensorHeader(NamedTuple):
    """One tensor of a file: dtype as the format spells it (`F32`), shape, and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte from the beginning of the file."""
    nbytes: int

    @property
    def kind(self) -> str:
        """The tensor's kind as `weight_shapes.TensorType` has it."""
        return _INTEGERS.get(self.dtype, "complex64" if self.dtype == "C64" else "float")


class SafetensorsHeader(NamedTuple):
    """What a file holds: tensors by name, and texts."""

    tensors: dict[str, TensorHeader]
    metadata: dict[str, str]


def read_header(path: str | Path, remedy: str) -> SafetensorsHeader:
    """Read the header of a safetensors file; `remedy` says what to do about a damaged one.

    Lengths follow from dtype and shape, and tensors fill the data without gap or overlap, so that whoever reads data
    by it stays inside the file. Raises FileNotFoundError, and UserError for everything else.
    """
    with documents.open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{path} is damaged or not a safetensors file: {remedy}.")
        content = file.read(length)
    entries = documents.parse(content, dict[str, Any], path, remedy)
    metadata = documents.convert(entries.pop(_METADATA, {}), dict[str, str], f"{path}, {_METADATA}", remedy)
    records = documents.convert(entries, dict[str, _Entry], path, remedy)
    tensors = {
        name: TensorHeader(entry.dtype, entry.shape, 8 + length + entry.data_offsets[0], _bytes_of(entry))
        for name, entry in records.items()
    }
    end = 8 + length
    for name, entry in sorted(records.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if tensors[name].start != end or stop - start != tensors[name].nbytes:
            raise UserError(
                f"{path} is damaged, the bytes of {quote(name)} are not those of its dtype and shape: {remedy}."
            )
        end += tensors[name].nbytes
    if end != size:
        raise UserError(f"{path} is damaged, it has {size:,} bytes and {end:,} by its header: {remedy}.")
    return SafetensorsHeader(tensors, metadata)


def _bytes_of(entry: _Entry) -> int:
    """Bytes that a tensor's dtype and shape take; -1 for an unknown dtype."""
    return prod(entry.shape) * ELEMENT_BYTES[entry.dtype] if entry.dtype in ELEMENT_BYTES else -1
