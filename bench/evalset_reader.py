"""Reads the shipped evaluation set: captions, scene questions and episodes with their pixels.

Needs numpy and Pillow only; knows nothing about models or scoring.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from PIL import Image, UnidentifiedImageError

from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.formats import documents
from microvlm.formats.documents import Count

LARGEST_SIDE = 4096
FORMATS = ("PNG", "JPEG", "WEBP")
Words = Annotated[str, Meta(max_length=1000)]
FileBelow = Annotated[str, Meta(pattern=r"^(?!/)(?!(.*/)?\.\.?(/|\Z))[^\\:\x00]{1,200}\Z")]
"""A file's name below the set's folder, with slashes."""


@dataclass(frozen=True)
class EvalImage:
    """One drawing on white and its caption."""

    file: FileBelow
    caption: Words
    hexcode: Words
    group: Words


@dataclass(frozen=True)
class EvalScene:
    """One question about one scene; several questions share a file."""

    file: FileBelow
    kind: Words
    """`what`, `where`, `how many` or `which colour`."""
    question: Words
    answer: Words
    twin: FileBelow | None
    """The file with the same objects in each other's place, where the same question has another
    answer; None for the kinds whose answer does not depend on places."""
    objects: tuple[Words, ...]
    ground: Words


@dataclass(frozen=True)
class EpisodeStep:
    """One question after an episode."""

    question: Words
    answer: Words
    step: Count
    """Index of the image that the question is about, from 0."""
    distance: Count
    """Images shown after that one."""


@dataclass(frozen=True)
class EvalEpisode:
    """Images in order, then questions."""

    files: Annotated[tuple[FileBelow, ...], Meta(min_length=1, max_length=1000)]
    questions: tuple[EpisodeStep, ...]
    twin: Count
    """Index of the episode with the same images in another order."""

    def __post_init__(self) -> None:
        if any(question.step >= len(self.files) for question in self.questions):
            raise ValueError("a question is about an image that the episode does not have")


class _Document(msgspec.Struct, frozen=True):
    """evalset.json."""

    images: tuple[EvalImage, ...]
    scenes: tuple[EvalScene, ...]
    episodes: tuple[EvalEpisode, ...]

    def __post_init__(self) -> None:
        if any(episode.twin >= len(self.episodes) for episode in self.episodes):
            raise ValueError("an episode's twin is not in the set")


@dataclass(frozen=True)
class EvalSet:
    """The whole set; `pixels` reads one file of it."""

    folder: Path
    images: tuple[EvalImage, ...]
    scenes: tuple[EvalScene, ...]
    episodes: tuple[EvalEpisode, ...]

    def path(self, file: str) -> Path:
        return self.folder / file

    def pixels(self, file: str) -> np.ndarray:
        """uint8 [96, 96, 3]."""
        return read_drawing(self.path(file))


def read_drawing(path: Path) -> np.ndarray:
    """A picture file as uint8 [H, W, 3]. Raises UserError."""
    try:
        content = io.BytesIO(documents.read_file(path))
        with Image.open(content, formats=FORMATS) as image:
            if max(image.size) > LARGEST_SIDE:
                raise UserError(f"The evaluation image {path} has a side of more than {LARGEST_SIDE} pixels.")
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"The evaluation image {path} cannot be read ({_cause(error)}).") from None


def _cause(error: Exception) -> str:
    # Pillow names a file that is in memory.
    return "it is no picture" if isinstance(error, UnidentifiedImageError) else printable(str(error))


def load_evalset(path: str | Path | None = None) -> EvalSet:
    """The set in the folder `path`, or the package's own. Raises UserError."""
    folder = Path(path) if path is not None else Path(__file__).with_name("evalset")
    file = folder / "evalset.json"
    try:
        document = documents.load(file, _Document, "copy the evaluation set again")
    except FileNotFoundError:
        raise UserError(f"{folder} is not an evaluation set: it holds no evalset.json.") from None
    return EvalSet(folder, document.images, document.scenes, document.episodes)
