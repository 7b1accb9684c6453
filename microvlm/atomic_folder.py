"""Replace folders atomically: a name leads to the whole old folder or the whole new one, whatever happens.

A file replaces the old one by one rename. POSIX has no such rename for a folder that is not empty: Linux exchanges the
two by renameat2. Elsewhere two renames are needed, and a writer that is killed between them leaves the target without a
name. The temporary folder then holds both folders, and `temporary_folder.recover`, which readers call for a name that
leads nowhere and every writer calls first, moves the new one into place.

A folder that holds anything but our files is not replaced: `new_files` replaces the files in it one by one. A marker
file names the temporary folder that holds the others meanwhile, so that `recover` can finish what was cut off.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from microvlm.atomic import flush_file, os_errors_about, set_permissions
from microvlm.temporary_folder import (
    INCOMPLETE,
    REPLACED,
    finish_files,
    flush_folder,
    holds_mounts,
    label,
    recover,
    remove_leftovers,
    temporary_folder,
)

_MANY_FILES = 1000
"""Above this number one flush of all file systems is faster than a flush of each file."""
_NO_EXCHANGE = {errno.EEXIST, errno.EXDEV, errno.EBUSY, errno.EACCES, errno.EPERM}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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
    with os_errors_about(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target) as temporary:
            folder = temporary / target.name
            folder.mkdir()
            yield folder
            _flush_tree(folder)
            _publish(folder, target, replace, keep_others)
            flush_folder(target.parent)


@contextmanager
def new_files(path: str | Path, names: Collection[str]) -> Iterator[Path]:
    """Yield an empty temporary folder whose files get into the folder `path` when the block ends without an exception.

    An old folder that holds nothing but files called as in `names` is replaced by the new one, with those of its files
    that the new one lacks. In a folder with anything else in it, or that cannot be renamed (the working directory of
    this process, a mount point), the files are replaced one by one; the file INCOMPLETE is there meanwhile, and
    `recover` finishes what was cut off.

    Raises UserError, in one sentence, for errors of the file system.
    """
    target = Path(os.path.realpath(path))
    with os_errors_about(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        remove_leftovers(target)
        remove_leftovers(target.parent, target.name)
        inside = target.is_dir() and not _holds_only(target, names)
        with temporary_folder(target / target.name if inside else target) as temporary:
            folder = temporary / target.name
            folder.mkdir()
            yield folder
            if inside:
                _replace_files(folder, target)
            else:
                _replace_whole(folder, target, names)


def _holds_only(folder: Path, names: Collection[str]) -> bool:
    """Whether a folder can be replaced: only regular files of these names in it, and nobody needs it to stay."""
    try:
        with os.scandir(folder) as entries:
            ours = all(entry.name in names and entry.is_file(follow_symlinks=False) for entry in entries)
        working = os.path.samestat(os.stat("."), folder.stat())
    except OSError:
        return False
    effective = os.access in os.supports_effective_ids
    movable = os.access(folder.parent, os.W_OK | os.X_OK, effective_ids=effective) and not holds_mounts(
        folder
    )
    return ours and movable and not working


def _replace_whole(folder: Path, target: Path, names: Collection[str]) -> None:
    """Put `folder` in the place of `target`, or its files into `target` where the whole cannot be replaced."""
    new_names = set(os.listdir(folder))
    try:
        if target.is_dir():
            for name in set(names) - new_names - {INCOMPLETE}:
                if os.path.lexists(target / name):
                    _link_or_copy(target / name, folder / name)
        _flush_tree(folder)
        _publish(folder, target, lambda old: _holds_only(old, names))
    except OSError as error:
        if error.errno not in _NO_EXCHANGE or not target.is_dir():
            raise
        for name in set(os.listdir(folder)) - new_names:
            (folder / name).unlink()
        _replace_files(folder, target)
        return
    for old in (folder, folder.with_name(label(target.name) + REPLACED)):
        # What another process put into the old folder since the last look at it.
        for name in (set(os.listdir(old)) if old.is_dir() else set()) - set(names):
            if not os.path.lexists(target / name):
                os.rename(old / name, target / name)
    flush_folder(target.parent)


def _replace_files(folder: Path, target: Path) -> None:
    """Replace the files of `target` by those of `folder` one by one, with the marker INCOMPLETE meanwhile."""
    _flush_tree(folder)
    names = sorted(os.listdir(folder))
    for name in names:
        old = target / name
        if os.path.lexists(old) and holds_mounts(old):
            raise OSError(
                errno.EBUSY, "it is mounted by itself and cannot be replaced; save elsewhere", str(old)
            )
        if old.is_dir() and not old.is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(old))
        if old.is_file():
            set_permissions(folder / name, old.stat())
    marker = target / INCOMPLETE
    unmarked = not marker.exists()
    new_marker = folder.parent / INCOMPLETE
    new_marker.write_bytes(os.fsencode(folder.parent.name))
    flush_file(new_marker)
    os.replace(new_marker, marker)  # from here on the replacement is finished by whoever comes next
    flush_folder(target)
    replaced = False
    try:
        for name in names:
            os.replace(folder / name, target / name)
            replaced = True
    except BaseException:
        if replaced:
            with contextlib.suppress(OSError):
                finish_files(folder, target)
        elif unmarked:
            marker.unlink()
        raise
    finish_files(folder, target)


def _keep_others(old: Path, new: Path) -> None:
    """Put links or copies of the files of `old` that `new` lacks into `new`."""
    for name in sorted(os.listdir(old)):
        source, kept = old / name, new / name
        if source.is_dir() and not source.is_symlink():
            if not os.path.lexists(kept):
                kept.mkdir()
                shutil.copystat(source, kept)
            if kept.is_dir():
                _keep_others(source, kept)
        elif not os.path.lexists(kept):
            _link_or_copy(source, kept)


def _link_or_copy(source: Path, copy: Path) -> None:
    """Make a hard link, or a copy where the file system has none."""
    try:
        os.link(source, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, copy, follow_symlinks=False)


def _publish(
    folder: Path, target: Path, replace: Callable[[Path], bool] | None, keep_others: bool = False
) -> None:
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
    if holds_mounts(target):
        raise OSError(
            errno.EBUSY, "something is mounted in it; unmount that or give another name", str(target)
        )
    if keep_others:
        _keep_others(target, folder)
        _flush_tree(folder)
    set_permissions(folder, target.stat())
    if not _exchange(folder, target):
        _swap(folder, target)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step. False where that is refused; two renames then work, or say why not."""
    if sys.platform != "linux":
        return False
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _swap(folder: Path, target: Path) -> None:
    """Two renames; when only the first succeeds the old folder gets its name back."""
    replaced = folder.with_name(label(target.name) + REPLACED)
    try:
        os.rename(target, replaced)
        os.rename(folder, target)
    except BaseException:
        if not os.path.lexists(target):
            with contextlib.suppress(OSError):
                os.rename(replaced, target)
        raise


def _flush_tree(folder: Path) -> None:
    """Put the content on the disk before it gets its name: a power cut must not leave a whole name with holes."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    if len(paths) > _MANY_FILES and hasattr(os, "sync"):
        os.sync()
        return
    for path in paths:
        if path.is_file():
            flush_file(path)
        elif path.is_dir():
            flush_folder(path)
    flush_folder(folder)
