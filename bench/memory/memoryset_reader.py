"""Reads the objects to remember: drawings of emoji that no training saw, and another vendor's drawing of each.

Needs numpy and Pillow only; knows nothing about models or facts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from microvlm.bench.evalset_reader import read_drawing
from microvlm.errors import UserError


@dataclass(frozen=True)
class MemoryObject:
    """Two drawings on white of one emoji."""

    file: str
    other: str
    """Image file of another vendor's drawing."""
    caption: str
    hexcode: str


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
        document = json.loads(file.read_text(encoding="utf-8"))
        return MemorySet(folder, tuple(MemoryObject(**record) for record in document["objects"]))
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no memoryset.json: it is not a set of objects to remember."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}).") from None
