"""Captioned pictures that are drawn, for a measurement without data: coloured shapes, as JPEG files in memory."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from microvlm.training.data.caption_data import CaptionData, CaptionSample, Turn

COUNT = 256
SIDE = 320
"""Pixels of a picture's longer side; the shorter one has three quarters."""
_COLOURS = {"red": (210, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 210), "yellow": (220, 200, 40)}
_SHAPES = ("disc", "square", "triangle")
_GROUNDS = {"a dark": 60, "a grey": 130, "a light": 210}


class GeneratedCaptions(CaptionData):
    """COUNT pictures of two shapes side by side, all of the training split. The number of a sample decides it."""

    folder = Path("generated-captions")
    name = "generated"

    def shard_sizes(self, split: str) -> np.ndarray:
        return np.array([COUNT if split == "train" else 0], np.int64)

    def sample(self, split: str, index: int) -> CaptionSample:
        if split != "train" or not 0 <= index < COUNT:
            raise IndexError(f"{split} {index}")
        return CaptionSample(f"generated-{index:03d}", (_picture(index),), (Turn(_caption(index)),))

    def texts(self, split: str) -> Iterator[str]:
        yield from (_caption(index) for index in range(self.count(split)))


def _draws(index: int) -> tuple[list[tuple[str, str]], str]:
    """The two things of a picture, colour and shape each, and its ground."""
    rng = np.random.default_rng(index)
    things = [(str(rng.choice(list(_COLOURS))), str(rng.choice(_SHAPES))) for _ in range(2)]
    return things, str(rng.choice(list(_GROUNDS)))


def _caption(index: int) -> str:
    (left, right), ground = _draws(index)
    return f"a picture of a {' '.join(left)} to the left of a {' '.join(right)} on {ground} ground, number {index}"


@lru_cache(maxsize=COUNT)
def _picture(index: int) -> bytes:
    things, ground = _draws(index)
    width, height = SIDE, SIDE * 3 // 4
    image = Image.new("RGB", (width, height), (_GROUNDS[ground],) * 3)
    pen = ImageDraw.Draw(image)
    for place, (colour, shape) in enumerate(things):
        left, top, size = width // 8 + place * width // 2, height // 4, width // 4
        box = (left, top, left + size, top + size)
        if shape == "disc":
            pen.ellipse(box, fill=_COLOURS[colour])
        elif shape == "square":
            pen.rectangle(box, fill=_COLOURS[colour])
        else:
            corners = [(left, top + size), (left + size, top + size), (left + size // 2, top)]
            pen.polygon(corners, fill=_COLOURS[colour])
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()
