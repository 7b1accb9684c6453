"""Hidden temporary folders beside their targets, and what killed writers left in them.

New content is written into `.NAME.new-xxxxxxxx` (readable by its owner only) and renamed to NAME from there. A hash
stands for a long name. An exception removes the temporary folder; a killed writer leaves it behind.

A writer holds a lock (flock) on its temporary folder. The kernel drops the lock however the process ends, so the next
writer of the same target removes every temporary folder that nobody locks. Process ids would not do: containers reuse
them. On file systems without locks a temporary folder counts as abandoned after a day.

Nothing is removed below a mount point. Uses the standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: leftovers are removed by their age
    fcntl = None  # type: ignore[assignment]

TEMPORARY_NAME = re.compile(r"\.(?P<label>.+)\.new-[0-9a-f]{8}", re.DOTALL)
INCOMPLETE = ".incomplete"
"""Name of the file that marks a folder while some of its files are new and some are old.

It holds the name of the temporary folder, inside or beside the marked one, in which the rest of the new files are.
"""
REPLACED = ".replaced"
"""Suffix of the old folder's name inside the temporary folder, between the two renames of a swap."""
_LONG_NAME_BYTES = 200
_ABANDONED_AFTER_S = 86_400


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden, locked, empty folder beside `target`; it is removed at the end with all it holds. Raises OSError.

    For scratch files that must be on the target's file system; what `new_file` and `new_folder` rename is made in it.
    """
    remove_leftovers(target.parent, target.name)
    folder = lock = None
    try:
        while lock is None:
            folder = target.with_name(f".{label(target.name)}.new-{secrets.token_hex(4)}")
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
            remove_tree(folder)
        if lock is not None:
            os.close(lock)


def recover(path: str | Path) -> None:
    """Finish a folder's replacement that was cut off: between its two renames, or between two of its files."""
    target = Path(os.path.realpath(path))
    if not os.path.lexists(target):
        remove_leftovers(target.parent, target.name)
    elif os.path.lexists(target / INCOMPLETE):
        remove_leftovers(target, target.name)
        remove_leftovers(target.parent, target.name)


def remove_leftovers(parent: Path, name: str | None = None) -> None:
    """Remove what killed writers of `parent`/`name`, or of anything in `parent`, left behind. Raises nothing."""
    with contextlib.suppress(OSError):
        for entry in sorted(os.listdir(parent)):
            match = TEMPORARY_NAME.fullmatch(entry)
            if match and (name is None or label(name) == match["label"]):
                with contextlib.suppress(OSError):
                    _remove_abandoned(parent / entry, match["label"])


def label(name: str) -> str:
    """The name, or a hash in place of one that is too long to have something added."""
    data = os.fsencode(name)
    return name if len(data) <= _LONG_NAME_BYTES else hashlib.sha256(data).hexdigest()[:32]


def holds_mounts(path: Path) -> bool:
    """Whether `path`, or anything below it, is a mount point (also of a single file)."""
    real = os.path.realpath(path)
    try:
        table = Path("/proc/self/mountinfo").read_bytes()
    except OSError:
        devices = {os.lstat(folder).st_dev for folder, _, _ in os.walk(real)}
        return os.path.ismount(real) or len(devices) > 1
    mounts = (re.sub(rb"\\([0-7]{3})", _octal, line.split()[4]) for line in table.splitlines())
    return any(mount == os.fsencode(real) or mount.startswith(os.fsencode(real) + b"/") for mount in mounts)


def remove_tree(folder: Path) -> None:
    """Remove a folder and all below it as far as possible, and nothing if a file system is mounted in it."""
    if not holds_mounts(folder):
        shutil.rmtree(folder, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder, as far as the system allows it; the content of the files is safe already."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _octal(match: re.Match[bytes]) -> bytes:
    return bytes([int(match[1], 8)])


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


def _remove_abandoned(folder: Path, target_label: str) -> None:
    """Remove a temporary folder unless its writer lives, after finishing the replacement that it may stand for."""
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
        name = next((name for name in os.listdir(folder) if label(name) == target_label), None)
        # Nobody else may choose what gets the target's name by leaving a folder here.
        trusted = status.st_uid in (os.stat(folder.parent).st_uid, getattr(os, "geteuid", lambda: 0)())
        swapping = name is not None and os.path.lexists(folder / (target_label + REPLACED))
        if trusted and name is not None and swapping and not os.path.lexists(folder.parent / name):
            os.rename(folder / name, folder.parent / name)
            flush_folder(folder.parent)
        if trusted and name is not None and not swapping:
            for target in (folder.parent, folder.parent / name):
                finish_files(folder / name, target)
        remove_tree(folder)
    finally:
        if lock is not None:
            os.close(lock)


def finish_files(new_files: Path, target: Path) -> None:
    """Move the rest of the new files into `target`, if its marker says that it waits for them. Raises OSError."""
    marker = target / INCOMPLETE
    try:
        descriptor = os.open(
            marker, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
        )
    except OSError:
        return
    with open(descriptor, "rb") as file:
        if file.read(_LONG_NAME_BYTES * 2) != os.fsencode(new_files.parent.name):
            return
    for name in sorted(os.listdir(new_files)):
        os.replace(new_files / name, target / name)
    flush_folder(target)
    marker.unlink()
    flush_folder(target)
