"""Records behind the first part of a file, each hashed together with all that is before it.

A record is a prefix (`MAGIC`, the content's length as uint64, eight bytes that check both), the content, and the sha256
of the digest before, the length and the content. One append writes one record.

The last record is torn when its writer was cut off by a kill or a power failure: the file ends within it, or blocks of
it were never written and are zeros. A torn record is left out. Whatever else is wrong was changed by somebody, and the
file is refused. A file that ends exactly behind a record cannot be told from an older state of itself.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import BinaryIO

from microvlm.memory.tensor_blob import read_exactly

MAGIC = b"MVLM+ROW"
_PREFIX = struct.Struct("<8sQ8s")
_DIGEST_BYTES = 32
_BLOCK_BYTES = 512
"""The smallest piece that a disk writes or loses."""


def record(content: bytes, digest: bytes) -> tuple[bytes, bytes]:
    """The record of some content behind a file whose digest is `digest` -> (its bytes, the file's digest with it)."""
    digest_after = _digest(digest, content)
    prefix = _PREFIX.pack(MAGIC, len(content), _check(digest, len(content)))
    return b"".join((prefix, content, digest_after)), digest_after


class RecordReader:
    """Iterates over the contents of a file's records. Raises ValueError for a record that is neither whole nor torn."""

    def __init__(self, file: BinaryIO, end: int, size: int, digest: bytes):
        """Starts at `end`, the position of `file`, which has `size` bytes; `digest` is that of the bytes before."""
        self._file, self._size = file, size
        self.end = end
        """Where the last whole record ends, and the first part of the file before it was read."""
        self.digest = digest
        """The digest of the file up to there."""
        self.is_torn = False
        """Whether a torn record follows."""

    def __iter__(self) -> Iterator[bytes]:
        while self.end < self._size:
            content = self._next()
            if content is None:
                self.is_torn = True
                return
            yield content

    def _next(self) -> bytes | None:
        """The next record's content, None when it is torn. Raises ValueError."""
        rest = self._size - self.end
        if rest < _PREFIX.size:
            start = read_exactly(self._file, rest, rest)
            if start[: len(MAGIC)] == MAGIC[:rest] or _is_unwritten(start):
                return None
            raise ValueError("other bytes behind the last record")
        prefix = read_exactly(self._file, _PREFIX.size, rest)
        magic, length, check = _PREFIX.unpack(prefix)
        if magic != MAGIC or check != _check(self.digest, length):
            tail = read_exactly(self._file, rest - _PREFIX.size, rest)
            if _is_unwritten(prefix + tail):
                return None
            is_lost = not any(check) or not any(tail)
            if is_lost and _has_lost_blocks(prefix + tail) and MAGIC not in tail:
                return None
            raise ValueError("a record's prefix was changed")
        end = self.end + _PREFIX.size + length + _DIGEST_BYTES
        if end > self._size:
            return None
        content = read_exactly(self._file, length, rest)
        stored_digest = read_exactly(self._file, _DIGEST_BYTES, rest)
        digest = _digest(self.digest, content)
        if digest == stored_digest:
            self.end, self.digest = end, digest
            return content
        if end == self._size and _has_lost_blocks(content + stored_digest):
            return None
        raise ValueError("a record was changed")


def _digest(previous: bytes, content: bytes) -> bytes:
    digest = hashlib.sha256(previous)
    digest.update(len(content).to_bytes(8, "little"))
    digest.update(content)
    return digest.digest()


def _check(previous: bytes, length: int) -> bytes:
    """Tells a changed length from the length of a record that was cut off."""
    return hashlib.sha256(MAGIC + previous + length.to_bytes(8, "little")).digest()[:8]


def _is_unwritten(end_of_file: bytes) -> bool:
    """Whether only zeros, however few, are where a record should be, or only zeros behind the start of `MAGIC`."""
    return MAGIC.startswith(end_of_file.rstrip(b"\0"))


def _has_lost_blocks(end_of_file: bytes) -> bool:
    """Whether blocks of zeros are where something else was written: a sha256 at the end is never all zeros."""
    return end_of_file.endswith(bytes(_DIGEST_BYTES)) or bytes(_BLOCK_BYTES) in end_of_file
