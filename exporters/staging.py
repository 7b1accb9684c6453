"""The folder that a bundle is written into: it gets its name when it is complete, and never replaces anything else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from microvlm.atomic_folder import new_folder
from microvlm.errors import UserError
from microvlm.formats.bundle import is_bundle
from microvlm.temporary_folder import recover

_HEADROOM_BYTES = 4 << 20
"""Graphs, manifest and tokenizer beside the weights."""


@dataclass(frozen=True)
class Stage:
    """The temporary folder `path` of a bundle that will be `output`."""

    path: Path
    output: Path

    def require_space(self, payload_bytes: int) -> None:
        """Raise UserError when the disk has less room than the weights need, before any is written."""
        needed = payload_bytes + _HEADROOM_BYTES
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UserError(
                f"{self.output.parent} has {free / 1e6:.0f} MB free and the bundle needs {needed / 1e6:.0f} MB: "
                "free space or choose another folder with -o."
            )


@contextmanager
def staged(output: Path, force: bool) -> Iterator[Stage]:
    """Yield an empty folder that becomes `output` when the block ends without an exception.

    With `force` a bundle (or an empty folder) of that name is replaced, at the end. Raises UserError when `output`
    exists otherwise, or cannot be written.
    """
    output = Path(os.path.abspath(output))
    recover(output)
    _refuse(output, force)
    with new_folder(output, replace=is_bundle if force else None) as folder:
        yield Stage(folder, output)


def _refuse(output: Path, force: bool) -> None:
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} is not a folder: create it, or choose another with -o.")
    if not os.path.lexists(output):
        return
    if not force:
        raise UserError(f"{output} exists: give another folder with -o, or --force to replace it.")
    replaceable = output.is_dir() and not output.is_symlink()
    if not replaceable or not (is_bundle(output) or not any(output.iterdir())):
        raise UserError(
            f"{output} is not a bundle, so --force does not replace it: give another folder with -o."
        )
