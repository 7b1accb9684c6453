"""A folder that is complete or absent: written aside in a hidden sibling, renamed when the last byte is there."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from microvlm.errors import UserError

MANIFEST = "manifest.json"
_MARK = ".partial-"
_HEADROOM_BYTES = 4 << 20
"""Graphs, manifest and tokenizer beside the weights."""


@dataclass(frozen=True)
class Stage:
    path: Path

    def require_space(self, payload_bytes: int) -> None:
        """Raises UserError when the disk has less room than the weights need, before any is written."""
        needed = payload_bytes + _HEADROOM_BYTES
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UserError(
                f"{self.path.parent} has {free / 1e6:.0f} MB free and the bundle needs {needed / 1e6:.0f} MB: "
                "free space or choose another folder with -o."
            )


@contextlib.contextmanager
def staged(output: Path, force: bool) -> Iterator[Stage]:
    """Yields a fresh folder beside `output`; renames it to `output` when the block ends well, else removes it.

    With `force` an earlier bundle (or an empty folder) is replaced, at the end and not before. Raises UserError when
    `output` exists otherwise, or cannot be written.
    """
    output = Path(os.path.abspath(output))
    _refuse(output, force)
    _remove_abandoned(output)
    aside = output.with_name(f".{output.name}{_MARK}{os.getpid()}")
    try:
        aside.mkdir()
        yield Stage(aside)
        _sync(aside)
        _publish(aside, output)
    except OSError as error:
        raise _as_user_error(error, output, aside) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _refuse(output: Path, force: bool) -> None:
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} is not a folder: create it, or choose another with -o.")
    if not os.path.lexists(output):
        return
    if not force:
        raise UserError(f"{output} exists: give another folder with -o, or --force to replace it.")
    replaceable = output.is_dir() and not output.is_symlink()
    if not replaceable or not ((output / MANIFEST).is_file() or not any(output.iterdir())):
        raise UserError(
            f"{output} is not a bundle, so --force does not replace it: give another folder with -o."
        )


def _publish(aside: Path, output: Path) -> None:
    old = aside.with_name(f"{aside.name}-old")
    if output.exists():
        os.rename(output, old)
    try:
        os.rename(aside, output)
    except OSError:
        if old.exists():
            os.rename(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Put the bytes on the disk before the name, so that a power cut leaves no bundle with holes."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _remove_abandoned(output: Path) -> None:
    """A killed export cannot clean up after itself; the next one to the same folder does."""
    for path in output.parent.glob(f".{output.name}{_MARK}*"):
        process = path.name.rpartition("-")[2]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _as_user_error(error: OSError, output: Path, aside: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"no room is left to write {output}: free space or choose another folder with -o; nothing was kept."
        )
    reason = error.strerror or type(error).__name__
    if error.filename is not None and aside not in (Path(error.filename), *Path(error.filename).parents):
        return UserError(f"{error.filename}: {reason}; nothing was written.")
    return UserError(
        f"{output} cannot be written ({reason}): choose another folder with -o; nothing was kept."
    )
