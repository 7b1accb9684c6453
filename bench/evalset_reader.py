"""Reads the shipped evaluation set: captions, scene questions and episodes with their pixels.

Needs numpy and Pillow only; knows nothing about models or scoring.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from microvlm.errors import UserError


@dataclass(frozen=True)
class EvalImage:
    """One drawing on white and its caption."""

    file: str
    caption: str
    hexcode: str
    group: str


@dataclass(frozen=True)
class EvalScene:
    """One question about one scene; several questions share a file."""

    file: str
    kind: str
    """`what`, `where`, `how many` or `which colour`."""
    question: str
    answer: str
    twin: str | None
    """The file with the same objects in each other's place, where the same question has another
    answer; None for the kinds whose answer does not depend on places."""
    objects: tuple[str, ...]
    ground: str


@dataclass(frozen=True)
class EpisodeStep:
    """One question after an episode."""

    question: str
    answer: str
    step: int
    """Index of the image that the question is about, from 0."""
    distance: int
    """Images shown after that one."""


@dataclass(frozen=True)
class EvalEpisode:
    """Images in order, then questions."""

    files: tuple[str, ...]
    questions: tuple[EpisodeStep, ...]
    twin: int
    """Index of the episode with the same images in another order."""


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
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"The evaluation image {path} cannot be read ({error}).") from None


def load_evalset(path: str | Path | None = None) -> EvalSet:
    """The set in the folder `path`, or the package's own. Raises UserError."""
    folder = Path(path) if path is not None else Path(__file__).with_name("evalset")
    file = folder / "evalset.json"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not an evaluation set: it holds no evalset.json.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}).") from None
    try:
        return EvalSet(
            folder=folder,
            images=tuple(EvalImage(**record) for record in document["images"]),
            scenes=tuple(EvalScene(**r | {"objects": tuple(r["objects"])}) for r in document["scenes"]),
            episodes=tuple(
                EvalEpisode(tuple(r["files"]), tuple(EpisodeStep(**q) for q in r["questions"]), r["twin"])
                for r in document["episodes"]
            ),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is not in the format of an evaluation set ({error}).") from None
