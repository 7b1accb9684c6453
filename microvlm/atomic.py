"""Write files atomically: a name leads to the whole old content or the whole new one, whatever happens.

New content is written into a temporary folder beside its target (`temporary_folder`), flushed to the disk and renamed.
Folders are replaced in `atomic_folder`. Uses the standard library and the command line's error sentences only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from microvlm.console import describe_os_error
from microvlm.errors import UserError
from microvlm.temporary_folder import TEMPORARY_NAME, flush_folder, temporary_folder

_STREAMS = ("/dev/fd/", "/dev/std", "/proc/")
_NO_RENAME = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV, errno.ENAMETOOLONG}
"""Errors of a folder in which nothing can be created or renamed, while a file in it may still be written."""


def write_file(path: str | Path, content: bytes | str, fallback: bool = False) -> None:
    """Replace the file at `path` by `content` (text as UTF-8). Raises UserError as `new_file` does.

    With `fallback` a file that can be written but not replaced (mounted by itself, or in a read-only folder) is
    overwritten in its place. A pipe, a device or an open file of this process (/dev/stdout) has no old content to keep
    and is written directly.
    """
    data = content.encode() if isinstance(content, str) else content
    if _is_stream(path):
        with os_errors_about(path):
            Path(path).write_bytes(data)
        return
    try:
        with new_file(path) as temporary:
            temporary.write_bytes(data)
    except UserError as error:
        cause = error.__cause__
        if not (fallback and isinstance(cause, OSError) and cause.errno in _NO_RENAME):
            raise
        with os_errors_about(path), Path(path).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yield the path of an empty temporary file that replaces `path` when the block ends without an exception.

    The temporary file has the target's name, so writers that look at suffixes work. Symbolic links are followed to the
    file behind. The new file has the permissions of the old one, or those that the umask leaves.

    Raises UserError, in one sentence, for errors of the file system and for a pipe or a device.
    """
    target = real_file(path)
    with os_errors_about(path), temporary_folder(target) as folder:
        temporary = folder / target.name
        temporary.touch(exist_ok=False)
        usual = temporary.stat()
        yield temporary
        old = _stat(target) or usual
        flush_file(temporary)  # before the old permissions forbid to open it
        set_permissions(temporary, old)
        os.replace(temporary, target)
        flush_folder(target.parent)


def real_file(path: str | Path) -> Path:
    """The path behind symbolic links, of a regular file or of none yet.

    Raises UserError for a pipe or a device: opening one may wait forever, and a rename would replace it by a file.
    """
    real = Path(os.path.realpath(path))
    status = _stat(Path(path))
    if status is not None and not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise UserError(f"{path} is a pipe or a device, no regular file; give another name.")
    return real


@contextmanager
def os_errors_about(path: str | Path) -> Iterator[None]:
    """Turn errors of the file system into a UserError about `path`. A closed stdout is not one of them."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reported_path = (
            Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | Path) else None
        )
        if reported_path and (
            reported_path in (Path(path), Path(os.path.realpath(path)))
            or any(TEMPORARY_NAME.fullmatch(part) for part in reported_path.parts)
        ):
            error.filename = None
        raise UserError(f"{path} cannot be written: {describe_os_error(error)}") from error


def set_permissions(path: Path, old: os.stat_result) -> None:
    """Mode and, as far as this process may, owner and group of `old`."""
    status = path.stat()
    if (status.st_uid, status.st_gid) != (old.st_uid, old.st_gid) and hasattr(os, "chown"):
        with contextlib.suppress(OSError):
            os.chown(path, old.st_uid, old.st_gid)
    if stat.S_IMODE(path.stat().st_mode) != stat.S_IMODE(old.st_mode):
        os.chmod(path, stat.S_IMODE(old.st_mode))


def flush_file(path: Path) -> None:
    """Put a file's content on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_stream(path: str | Path) -> bool:
    status = _stat(Path(path))
    special = status is not None and (stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode))
    return special or os.path.abspath(path).startswith(_STREAMS)


def _stat(path: Path) -> os.stat_result | None:
    """None where there is nothing, or nothing to be looked at; opening it then says why."""
    try:
        return path.stat()
    except OSError:
        return None
