"""Append records to a file that is still as this process last saw it. Knows no memory.

One record is one write and one flush. A writer that fails takes its record back; one that is killed leaves a torn
record (`record_chain`). During an append the file itself is locked, besides the lock that callers hold for longer: two
processes without that one cannot put two records behind the same digest. Whoever may read the file can hold that lock
too, so nobody waits for it for long: the file is then written anew, under its name, which no lock on the old one keeps.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from microvlm.atomic import real_file
from microvlm.memory.record_chain import record
from microvlm.temporary_folder import remove_leftovers

try:
    import fcntl
except ImportError:  # Windows, where writers are not kept apart
    fcntl = None  # type: ignore[assignment]

ENDING_BYTES = 32
LOCK_WAIT_S = 1.0
"""How long an append waits for the lock of another one, which is held for one write and one flush."""
_LOCK_POLL_S = 0.01
_FLAGS = os.O_RDWR | os.O_APPEND
_FLAGS |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class AppendedFile:
    """A file as this process last read or wrote it, without a torn record."""

    path: Path
    """Behind symbolic links."""
    place: tuple[int, int]
    """Device and inode."""
    size: int
    digest: bytes
    """What the next record is hashed with."""
    ending: bytes
    """The last `ENDING_BYTES` of the file."""
    is_tidy: bool = False
    """Whether what killed writers left beside the file was removed."""

    @classmethod
    def at(cls, path: str | Path, size: int, digest: bytes, ending: bytes) -> AppendedFile:
        """The file that was just written whole, which removes the leftovers of others. Raises OSError, UserError."""
        real = real_file(path)
        status = os.stat(real)
        return cls(real, (status.st_dev, status.st_ino), size, digest, ending, is_tidy=True)

    def append(self, path: str | Path, content: bytes | None) -> AppendedFile | None:
        """Append a record of `content`, or of None nothing -> the file as it is then, flushed to the disk.

        None when `path` leads to another file, or to one that was changed, cannot be changed or stays locked; it has to
        be written anew. Raises OSError when the record does not fit, which is taken back then, and UserError for a
        device.
        """
        if real_file(path) != self.path:
            return None
        try:
            descriptor = os.open(self.path, _FLAGS)
        except OSError:
            return None
        try:
            if not (_lock(descriptor) and self._is_same(descriptor)):
                return None
            if not self.is_tidy:
                remove_leftovers(self.path.parent, self.path.name)
            after = replace(self, is_tidy=True)
            return after if content is None else after._append(descriptor, content)
        finally:
            os.close(descriptor)

    def _append(self, descriptor: int, content: bytes) -> AppendedFile:
        data, digest = record(content, self.digest)
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, self.size)
            raise
        return replace(self, size=self.size + len(data), digest=digest, ending=data[-ENDING_BYTES:])

    def _is_same(self, descriptor: int) -> bool:
        status = os.fstat(descriptor)
        if ((status.st_dev, status.st_ino), status.st_size) != (self.place, self.size):
            return False
        os.lseek(descriptor, self.size - len(self.ending), os.SEEK_SET)
        return os.read(descriptor, len(self.ending)) == self.ending


def _lock(descriptor: int) -> bool:
    """Lock the file -> whether nobody else kept it locked for `LOCK_WAIT_S`; true on a file system without locks."""
    if fcntl is None:
        return True
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOCK_POLL_S)
        except OSError:
            return True
        else:
            return True
