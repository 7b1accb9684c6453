"""One writer at a time for a file that is replaced by renaming: a lock beside it, which ends with its holder.

The file itself can't carry the lock, because every save puts another file in its place. A link to it is the same file,
with the same lock. Knows no memory.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from microvlm.console import describe_os_error
from microvlm.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where writers are not kept apart
    fcntl = None  # type: ignore[assignment]

WAIT_S = 10.0
_POLL_S = 0.02


def file_behind(path: str | Path) -> Path:
    """Where `path` leads through symbolic links, to a file that is there or not yet.

    Raises UserError for a pipe or a device: opening one may wait forever, and a save would put a file in its place.
    """
    real = Path(os.path.realpath(path))
    try:
        mode = os.stat(real).st_mode
    except OSError:  # who opens it says what is wrong
        return real
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path} is a pipe or a device, no regular file; give another name.")
    return real


@contextmanager
def locked(path: str | Path, wait_s: float | None = None) -> Iterator[None]:
    """Within, no other process that asks for the lock of `path` has it. `.NAME.lock` is there for as long.

    It lies beside the file that `path` leads to. Raises UserError when another holds it for `wait_s` seconds (`WAIT_S`
    when left out), when the folder can't be written, and for a pipe or a device.
    """
    real = file_behind(path)
    beside = real.with_name(f".{real.name}.lock")
    descriptor = _acquire(beside, Path(path), WAIT_S if wait_s is None else wait_s)
    try:
        yield
    finally:
        if fcntl is None:
            # Windows removes no file that is open, and no other process waits for this one.
            os.close(descriptor)
            beside.unlink(missing_ok=True)
        else:
            # Removed while it is held: who waits for it then finds that the name is gone, and makes another.
            beside.unlink(missing_ok=True)
            os.close(descriptor)


def _acquire(beside: Path, path: Path, wait_s: float) -> int:
    until = time.monotonic() + wait_s
    while True:
        descriptor = _open(beside, path)
        if _try_lock(descriptor):
            if _is_named(descriptor, beside):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
            os.close(descriptor)
            continue
        holder = os.pread(descriptor, 20, 0).decode("ascii", "replace")
        os.close(descriptor)
        if time.monotonic() >= until:
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise UserError(
                f"{path} is being changed by {who}, as an open microvlm chat does; end it or use another file."
            )
        time.sleep(_POLL_S)


def _open(beside: Path, path: Path) -> int:
    try:
        return os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        error.filename = str(path)
        raise UserError(f"the memory was not saved: {describe_os_error(error)}") from None


def _try_lock(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_named(descriptor: int, beside: Path) -> bool:
    """Whether the locked file is still the one of that name: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(beside))
    except FileNotFoundError:
        return False
