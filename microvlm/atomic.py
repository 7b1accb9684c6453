"""Write files and folders atomically: a name leads to the whole old content or the whole new one, whatever happens.

New content is written into a hidden temporary folder beside its target (`.NAME.new-xxxxxxxx`, readable by its owner
only), flushed to the disk and renamed. An exception removes the temporary folder; a killed writer leaves it behind.

A writer holds a lock (flock) on its temporary folder. The kernel drops the lock however the process ends, so the next
writer of the same target removes every temporary folder that nobody locks. Process ids would not do: containers reuse
them. On file systems without locks a temporary folder counts as abandoned after a day.

A file replaces the old one by one rename. POSIX has no such rename for a folder that is not empty: Linux exchanges the
two by renameat2. Elsewhere two renames are needed, and a writer that is killed between them leaves the target without a
name. The temporary folder then holds both folders, and `recover`, which readers call for a name that leads nowhere and
every writer calls first, moves the new one into place.

Uses the standard library and the command line's error sentences only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from microvlm.console import describe_os_error
from microvlm.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: leftovers are removed by their age
    fcntl = None  # type: ignore[assignment]

_TEMPORARY_NAME = re.compile(r"\.(?P<target>.+)\.new-[0-9a-f]{8}", re.DOTALL)
_REPLACED = ".replaced"
"""Suffix of the old folder's name inside the temporary folder, between the two renames of a swap."""
_ABANDONED_AFTER_S = 86_400
_STREAMS = ("/dev/fd/", "/dev/std", "/proc/")
_MANY_FILES = 1000
"""Above this number one flush of all file systems is faster than a flush of each file."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_file(path: str | Path, content: bytes | str) -> None:
    """Replace the file at `path` by `content` (text as UTF-8). Raises UserError as `new_file` does.

    A pipe, a device or an open file of this process (/dev/stdout) has no old content to keep and is written directly.
    """
    data = content.encode() if isinstance(content, str) else content
    if _is_stream(path):
        with _os_errors_about(path):
            Path(path).write_bytes(data)
        return
    with new_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yield the path of an empty temporary file that replaces `path` when the block ends without an exception.

    The temporary file has the target's name, so writers that look at suffixes work. Symbolic links are followed to the
    file behind. The new file has the permissions of the old one, or those that the umask leaves.

    Raises UserError, in one sentence, for errors of the file system and for a pipe or a device.
    """
    target = real_file(path)
    with _os_errors_about(path), temporary_folder(target) as folder:
        temporary = folder / target.name
        temporary.touch(exist_ok=False)
        usual = temporary.stat()
        yield temporary
        old = _stat(target) or usual
        descriptor = os.open(temporary, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            _set_permissions(temporary, old)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
        _flush_folder(target.parent)


@contextmanager
def new_folder(
    path: str | Path, replace: Callable[[Path], bool] | None = None, keep_others: bool = False
) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends without an exception.

    Missing parents are created and symbolic links are followed. `replace` is asked, right before the swap, whether the
    folder that has the name by then (and is not empty) may be replaced; without it, none may. With `keep_others` files
    of the old folder that the new one lacks are kept, as hard links or copies.

    Raises UserError, in one sentence, for errors of the file system and for a target that may not be replaced.
    """
    target = Path(os.path.realpath(path))
    with _os_errors_about(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target) as temporary:
            folder = temporary / target.name
            folder.mkdir()
            yield folder
            _flush_tree(folder)
            _publish(folder, target, replace, keep_others)
            _flush_folder(target.parent)


def recover(path: str | Path) -> None:
    """Finish a folder's replacement that was cut off between its two renames, if `path` has no name for that reason."""
    target = Path(os.path.realpath(path))
    if not os.path.lexists(target):
        remove_leftovers(target.parent, target.name)


def remove_leftovers(parent: Path, name: str | None = None) -> None:
    """Remove what killed writers of `parent`/`name`, or of anything in `parent`, left behind. Raises nothing."""
    with contextlib.suppress(OSError):
        for entry in sorted(os.listdir(parent)):
            match = _TEMPORARY_NAME.fullmatch(entry)
            if match and name in (None, match["target"]):
                with contextlib.suppress(OSError):
                    _remove_abandoned(parent / entry, parent / match["target"])


def real_file(path: str | Path) -> Path:
    """The path behind symbolic links, of a regular file or of none yet.

    Raises UserError for a pipe or a device: opening one may wait forever, and a rename would replace it by a file.
    """
    real = Path(os.path.realpath(path))
    status = _stat(Path(path))
    if status is not None and not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise UserError(f"{path} is a pipe or a device, no regular file; give another name.")
    return real


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


@contextmanager
def _os_errors_about(path: str | Path) -> Iterator[None]:
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
            or any(_TEMPORARY_NAME.fullmatch(part) for part in reported_path.parts)
        ):
            error.filename = None
        raise UserError(f"{path} cannot be written: {describe_os_error(error)}") from error


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden, locked, empty folder beside `target`; it is removed at the end with all it holds. Raises OSError.

    For scratch files that must be on the target's file system; what `new_file` and `new_folder` rename is made in it.
    """
    remove_leftovers(target.parent, target.name)
    folder = lock = None
    try:
        while lock is None:
            folder = target.with_name(f".{target.name}.new-{secrets.token_hex(4)}")
            try:
                os.mkdir(folder, 0o700)
            except FileExistsError:
                folder = None
                continue
            try:
                lock = _lock(folder)
            except (BlockingIOError, FileNotFoundError):
                continue  # Another writer took it for a leftover before it was locked.
            except OSError:
                break  # a file system without locks
        assert folder is not None
        yield folder
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int:
    """Lock a temporary folder and return the descriptor that holds the lock.

    Raises BlockingIOError when a living writer has it, FileNotFoundError when it was removed meanwhile, and OSError for
    a link and where there are no locks.
    """
    flags = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(folder, os.O_RDONLY | flags)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.lstat(folder)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove_abandoned(folder: Path, target: Path) -> None:
    """Remove a temporary folder unless its writer lives, after finishing the swap that it may stand for."""
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        return
    lock = None
    try:
        lock = _lock(folder)
    except (BlockingIOError, FileNotFoundError):
        return
    except OSError:
        if time.time() - status.st_mtime < _ABANDONED_AFTER_S:
            return
    try:
        new, replaced = folder / target.name, folder / (target.name + _REPLACED)
        # Nobody else may choose what gets the target's name by leaving a folder here.
        trusted = status.st_uid in (os.stat(target.parent).st_uid, getattr(os, "geteuid", lambda: 0)())
        if trusted and os.path.lexists(new) and os.path.lexists(replaced) and not os.path.lexists(target):
            os.rename(new, target)
            _flush_folder(target.parent)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def _publish(folder: Path, target: Path, replace: Callable[[Path], bool] | None, keep_others: bool) -> None:
    try:
        os.rename(folder, target)  # succeeds where there is nothing, or an empty folder
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if os.name == "nt" and target.is_dir() and not any(target.iterdir()):
        target.rmdir()
        os.rename(folder, target)
        return
    if replace is None or not replace(target):
        raise FileExistsError(errno.EEXIST, "it exists and is not replaced; give another name", str(target))
    if keep_others:
        _keep_others(target, folder)
        _flush_tree(folder)
    _set_permissions(folder, target.stat())
    if not _exchange(folder, target):
        _swap(folder, target)


def _keep_others(old: Path, new: Path) -> None:
    """Put hard links into `new`, or copies where the file system has none, of the files of `old` that `new` lacks."""
    for name in sorted(os.listdir(old)):
        source, copy = old / name, new / name
        if source.is_dir() and not source.is_symlink():
            if not os.path.lexists(copy):
                copy.mkdir()
                shutil.copystat(source, copy)
            if copy.is_dir():
                _keep_others(source, copy)
        elif not os.path.lexists(copy):
            try:
                os.link(source, copy, follow_symlinks=False)
            except OSError:
                shutil.copy2(source, copy, follow_symlinks=False)


def _exchange(path: Path, other_path: Path) -> bool:
    """Exchange two names in one step. False where that is refused; two renames then work, or say why not."""
    if sys.platform != "linux":
        return False
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(other_path), _RENAME_EXCHANGE) == 0


def _swap(folder: Path, target: Path) -> None:
    """Two renames; when only the first succeeds the old folder gets its name back."""
    replaced = folder.with_name(target.name + _REPLACED)
    try:
        os.rename(target, replaced)
        os.rename(folder, target)
    except BaseException:
        if not os.path.lexists(target):
            with contextlib.suppress(OSError):
                os.rename(replaced, target)
        raise


def _set_permissions(path: Path, old: os.stat_result) -> None:
    """Mode and, as far as this process may, owner and group of `old`."""
    status = path.stat()
    if (status.st_uid, status.st_gid) != (old.st_uid, old.st_gid) and hasattr(os, "chown"):
        with contextlib.suppress(OSError):
            os.chown(path, old.st_uid, old.st_gid)
    if stat.S_IMODE(path.stat().st_mode) != stat.S_IMODE(old.st_mode):
        os.chmod(path, stat.S_IMODE(old.st_mode))


def _flush_tree(folder: Path) -> None:
    """Put the content on the disk before it gets its name: a power cut must not leave a whole name with holes."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    if len(paths) > _MANY_FILES and hasattr(os, "sync"):
        os.sync()
        return
    for path in paths:
        if path.is_file():
            descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        elif path.is_dir():
            _flush_folder(path)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder, as far as the system allows it; the content of the files is safe already."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
