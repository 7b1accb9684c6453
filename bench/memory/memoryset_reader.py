"""Reads the objects to remember: drawings of emoji that no training saw, and another vendor's drawing of each.

Needs numpy and Pillow only; knows nothing about models or facts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from microvlm.bench.evalset_reader import FileBelow, Words, read_drawing
from microvlm.errors import UserError
from microvlm.formats import documents


@dataclass(frozen=True)
class MemoryObject:
    """Two drawings on white of one emoji."""

    file: FileBelow
    other: FileBelow
    """Image file of another vendor's drawing."""
    caption: Words
    hexcode: Words


class _Document(msgspec.Struct, frozen=True):
    """memoryset.json."""

    objects: Annotated[tuple[MemoryObject, ...], Meta(min_length=1)]


@dataclass(frozen=True)
class MemorySet:
    """The whole set; `pixels` reads one file of it."""

    folder: Path
    objects: tuple[MemoryObject, ...]

    def pixels(self, file: str) -> np.ndarray:
        """uint8 [96, 96, 3]."""
        return read_drawing(self.folder / file)


def load_memoryset(path: str | Path | None = None) -> MemorySet:
    """The set in the folder `path`, or the package's own. Raises UserError."""
    folder = Path(path) if path is not None else Path(__file__).parents[1] / "memoryset"
    file = folder / "memoryset.json"
    try:
        return MemorySet(folder, documents.load(file, _Document, "copy the set again").objects)
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no memoryset.json: it is not a set of objects to remember."
        ) from None
