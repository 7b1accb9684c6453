"""Reads the header of a GGUF file, typed and bounded, before any of its data. Imports no torch.

The file is the word GGUF, a version, the numbers of tensors and of metadata, the metadata (name, type, value), a record
of each tensor (name, sizes, type, offset), and the aligned data. All numbers are little endian. Every count is held
against the bytes that are left in the file, so that no header takes more time or memory than its own length.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import quote

SUFFIX = ".gguf"
REMEDY = "copy the file again"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_TEXT, _LIST = 8, 9
_LONGEST_TEXT = 16_000_000
"""Bytes of a text; a chat template has some thousands."""
_LONGEST_NAME = 300
_MOST_DIMENSIONS = 4
_MOST_ENTRIES = 1_000_000
_MOST_BYTES = 256_000_000
"""Of metadata and tensor records together: a vocabulary of 250,000 tokens and its merges have 15 MB."""


class BlockType(NamedTuple):
    """A type of tensors, as the `gguf` package lists it: `size` numbers are stored in `nbytes` bytes."""

    name: str
    size: int
    nbytes: int


class GgufTensor(NamedTuple):
    """One tensor of a file: shape with the rows first, and its bytes in the file."""

    type: BlockType
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GgufHeader(NamedTuple):
    """What a file holds: values by name, and tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def record(self, kind: type, names: Mapping[str, str]) -> Any:
        """A record of `kind` from metadata; `names` are its fields and their keys. Raises UserError."""
        values = {field: self.metadata[key] for field, key in names.items() if key in self.metadata}
        missing = [key for field, key in names.items() if field in _required(kind) and field not in values]
        if missing:
            raise UserError(f"{self.path}: {quote(missing[0])} is missing: {REMEDY}.")
        return documents.convert(values, kind, self.path, REMEDY)


def is_gguf(path: Path) -> bool:
    """Whether a path is a regular file that begins as a GGUF file does, or has its suffix."""
    try:
        with documents.open_regular(path) as file:
            return file.read(len(_MAGIC)) == _MAGIC or path.suffix.lower() == SUFFIX
    except (FileNotFoundError, UserError):
        return False


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file. Raises FileNotFoundError, and UserError for everything else."""
    types = _block_types()
    with documents.open_regular(path) as file:
        return _Reader(file, path).header(types)


def _block_types() -> dict[int, BlockType]:
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError:
        raise UserError("reading a GGUF file needs: pip install 'microvlm[train]'.") from None
    return {int(kind): BlockType(kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def _required(kind: type) -> set[str]:
    return {field.name for field in msgspec.structs.fields(kind) if field.required}


class _Reader:
    """Reads numbers and texts in order, never over the end of the file."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path = file, path
        self._size = os.fstat(file.fileno()).st_size
        self._position = 0

    def header(self, types: Mapping[int, BlockType]) -> GgufHeader:
        if self._size < 24 or self._take(4) != _MAGIC:
            raise UserError(f"{self._path} is damaged or not a GGUF file: {REMEDY}.")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise UserError(f"{self._path} has version {version} of GGUF; versions 2 and 3 are read.")
        tensor_count, value_count = self._count(24), self._count(12)
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            name = self._text(_LONGEST_NAME)
            if name in metadata:
                raise self._damage(f"it has {quote(name)} twice")
            metadata[name] = self._value(self._number("<I"))
        records = [self._tensor(types) for _ in range(tensor_count)]
        return GgufHeader(self._path, metadata, self._place(records, metadata))

    def _place(
        self, records: list[tuple[str, BlockType, tuple[int, ...], int]], metadata: dict[str, Any]
    ) -> dict[str, GgufTensor]:
        """The tensors by name, with their places in the file."""
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
            raise self._damage("its alignment is none")
        data = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in records:
            count = prod(shape)
            if name in tensors:
                raise self._damage(f"it has {quote(name)} twice")
            if count % kind.size or (shape and shape[-1] % kind.size):
                raise self._damage(f"the rows of {quote(name)} are not whole blocks of {kind.name}")
            nbytes = count // kind.size * kind.nbytes
            if offset % alignment or data + offset + nbytes > self._size:
                raise self._damage(f"the bytes of {quote(name)} lie outside of it")
            tensors[name] = GgufTensor(kind, shape, data + offset, nbytes)
        return tensors

    def _tensor(self, types: Mapping[int, BlockType]) -> tuple[str, BlockType, tuple[int, ...], int]:
        name = self._text(_LONGEST_NAME)
        dimensions = self._number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self._damage(f"{quote(name)} has {dimensions} dimensions")
        sizes = tuple(self._number("<Q") for _ in range(dimensions))
        number, offset = self._number("<I"), self._number("<Q")
        if number not in types:
            raise UserError(
                f"{self._path}: {quote(name)} has type {number}, which the installed gguf package does not know: "
                "upgrade it, or take another file."
            )
        if any(not 1 <= size < 2**40 for size in sizes):
            raise self._damage(f"{quote(name)} has a size of {max(sizes):,}")
        return name, types[number], sizes[::-1], offset

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _TEXT:
            return self._text(_LONGEST_TEXT)
        if kind != _LIST:
            raise self._damage(f"a value has the unknown type {kind}")
        item = self._number("<I")
        if item == _TEXT:
            return [self._text(_LONGEST_TEXT) for _ in range(self._count(8))]
        if item not in _SCALARS:
            raise self._damage(f"a list has entries of type {item}")
        code = _SCALARS[item][1]
        count = self._count(struct.calcsize(f"<{code}"))
        return list(struct.unpack(f"<{count}{code}", self._take(struct.calcsize(f"<{count}{code}"))))

    def _count(self, least_bytes: int) -> int:
        """A number of entries, each of at least `least_bytes` bytes of the rest of the file."""
        count = self._number("<Q")
        if count > _MOST_ENTRIES or count * least_bytes > self._size - self._position:
            raise self._damage(f"it announces {count:,} entries")
        return count

    def _text(self, longest: int) -> str:
        length = self._number("<Q")
        if length > longest:
            raise self._damage(f"it has a text of {length:,} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._damage("a text is not UTF-8") from None

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _take(self, length: int) -> bytes:
        self._position += length
        if self._position > min(self._size, _MOST_BYTES):
            raise self._damage("it ends inside its header")
        content = self._file.read(length)
        if len(content) != length:
            raise self._damage("it ends inside its header")
        return content

    def _damage(self, problem: str) -> UserError:
        return UserError(f"{self._path} is damaged, {problem}: {REMEDY}.")
