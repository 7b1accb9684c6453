"""Reads the files of a Qt resource archive (.rcc), as GCompris keeps its pictures in.

All numbers are big-endian. `tree`, `data` and `names` are offsets in the file:

    header  "qres" | u32 version | u32 tree | u32 data | u32 names | (from version 3) u32 flags
    tree    nodes of 14 bytes, from version 2 of 22 with a time at the end:
              u32 name | u16 flags | folder: u32 children, u32 first child; file: u16 land, u16 language, u32 content
    data    u32 bytes | bytes; compressed ones are u32 size | zlib stream
    names   u16 characters | u32 hash | UTF-16 text
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from microvlm.errors import UserError

_COMPRESSED, _FOLDER, _ZSTANDARD = 1, 2, 4
_MAX_FILE_BYTES = 64_000_000
_MAX_DEPTH = 32


def read_resources(content: bytes, origin: str) -> Iterator[tuple[str, bytes]]:
    """The path (without a slash in front) and bytes of each file that is stored plainly or by zlib.

    Raises UserError for content that is no such archive.
    """
    try:
        magic, version, tree, data, names = struct.unpack_from(">4s4I", content)
        if magic != b"qres" or version > 3:
            raise UserError(
                f"{origin} is no Qt resource archive of a known version; install its package again."
            )
        yield from _Archive(content, 22 if version >= 2 else 14, tree, data, names).files(0, "", 0)
    except (struct.error, zlib.error, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{origin} is damaged ({error}); install its package again.") from None


class _Archive:
    def __init__(self, content: bytes, node_bytes: int, tree: int, data: int, names: int):
        self.content, self.node_bytes = content, node_bytes
        self.tree, self.data, self.names = tree, data, names

    def files(self, node: int, folder: str, depth: int) -> Iterator[tuple[str, bytes]]:
        """The files of a node and below it."""
        place = self.tree + node * self.node_bytes
        name, flags = struct.unpack_from(">IH", self.content, place)
        path = f"{folder}/{self._name(name)}".lstrip("/") if node else ""
        if flags & _FOLDER:
            count, first = struct.unpack_from(">II", self.content, place + 6)
            if (
                depth == _MAX_DEPTH
                or count > len(self.content) // self.node_bytes
                or (count and first <= node)
            ):
                raise struct.error("its folders are in a circle")
            for child in range(first, first + count):
                yield from self.files(child, path, depth + 1)
        elif not flags & _ZSTANDARD:
            (offset,) = struct.unpack_from(">I", self.content, place + 10)
            yield path, self._file(self.data + offset, bool(flags & _COMPRESSED))

    def _name(self, offset: int) -> str:
        (length,) = struct.unpack_from(">H", self.content, self.names + offset)
        start = self.names + offset + 6
        return self.content[start : start + 2 * length].decode("utf-16-be")

    def _file(self, place: int, is_compressed: bool) -> bytes:
        (size,) = struct.unpack_from(">I", self.content, place)
        stored = self.content[place + 4 : place + 4 + size]
        return zlib.decompressobj().decompress(stored[4:], _MAX_FILE_BYTES) if is_compressed else stored
