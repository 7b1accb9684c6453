"""One writer at a time: a lock file beside a file that may be replaced. Knows no memory.

The file itself cannot carry the lock, because a save may put another file in its place. The lock ends with the process
that holds it. A symbolic link to a file has the file's lock.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from microvlm.atomic import real_file
from microvlm.console import describe_os_error
from microvlm.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where writers are not kept apart
    fcntl = None  # type: ignore[assignment]

WAIT_S = 10.0
_POLL_S = 0.02
MEMORY = "the memory"


@contextmanager
def locked(path: str | Path, wait_s: float | None = None, thing: str = MEMORY) -> Iterator[None]:
    """Hold the lock of `path`, which no two processes hold at once, during the block.

    The lock is the file `.NAME.lock` beside the file that `path` leads to; it is removed at the end. `thing` is what
    the file is called in errors.

    Raises UserError when another process holds it for `wait_s` seconds (`WAIT_S` when None), when the folder cannot be
    written, when the lock file's name is a link or no plain file, and when `path` is a pipe or a device.
    """
    real = real_file(path)
    lock_file = real.with_name(f".{real.name}.lock")
    descriptor = _acquire(lock_file, Path(path), WAIT_S if wait_s is None else wait_s, thing)
    try:
        yield
    finally:
        if fcntl is None:
            # Windows removes no file that is open, and no other process waits for this one.
            os.close(descriptor)
            lock_file.unlink(missing_ok=True)
        else:
            # Removed while it is held: a process that waits for it then finds the name gone and makes another.
            lock_file.unlink(missing_ok=True)
            os.close(descriptor)


def _acquire(lock_file: Path, path: Path, wait_s: float, thing: str) -> int:
    """The descriptor that holds the lock, with this process's number in the file."""
    deadline = time.monotonic() + wait_s
    while True:
        descriptor = _open(lock_file, path, thing)
        if _try_lock(descriptor):
            if _has_name(descriptor, lock_file):
                # Only so that others can be told; a full disk has no room for it.
                with suppress(OSError):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, str(os.getpid()).encode())
                return descriptor
            os.close(descriptor)
            continue
        holder = os.pread(descriptor, 20, 0).decode("ascii", "replace")
        os.close(descriptor)
        if time.monotonic() >= deadline:
            process = f"process {holder}" if holder.isdigit() else "another process"
            example = ", as an open microvlm chat does" if thing == MEMORY else ""
            raise UserError(f"{path} is being changed by {process}{example}; end it or use another file.")
        time.sleep(_POLL_S)


def _open(lock_file: Path, path: Path, thing: str) -> int:
    """Open or create the lock file. It is emptied later, so it must not be a way to a file of another name."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    if lock_file.is_symlink():
        raise _foreign(lock_file)
    try:
        descriptor = os.open(lock_file, flags, 0o666)
    except OSError as error:
        error.filename = str(path)
        raise UserError(f"{thing} was not saved: {describe_os_error(error)}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise _foreign(lock_file)
    return descriptor


def _foreign(lock_file: Path) -> UserError:
    return UserError(f"{lock_file} is a link or no plain file, so it cannot be the lock; remove it.")


def _try_lock(descriptor: int) -> bool:
    """Whether nobody else has the lock. On a file system without locks, as on Windows, nobody ever has."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _has_name(descriptor: int, lock_file: Path) -> bool:
    """Whether the locked file still has its name: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(lock_file))
    except FileNotFoundError:
        return False
