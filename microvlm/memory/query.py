"""A query of the memory: the words of a question and the image in view, as the model gets both.

Two queries are equal when their words and their pixels are. These are texts and whole numbers, the same on every
backend, while the keys that a model makes of them differ in their last bits.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from microvlm.inputs.images import ImageSource, load_square
from microvlm.inputs.processor import Inputs, Processor


class Query(NamedTuple):
    """One question, about one image or none."""

    question: str
    """The normalized words."""
    pixels: np.ndarray | None = None
    """uint8 [side, side, 3], the image at the size that the model sees."""

    @classmethod
    def build(cls, processor: Processor, question: str, image: ImageSource | None) -> Query:
        """Normalize the words and scale the image, which is read once. Raises UserError for a bad image."""
        side = processor.config.vision.image_size
        pixels = None if image is None else np.asarray(load_square(image, side))
        return cls(processor.normalize_text(question), pixels)

    @property
    def picture(self) -> str:
        """Hexadecimal sha256 of the pixels; empty without an image."""
        return "" if self.pixels is None else hashlib.sha256(self.pixels.tobytes()).hexdigest()

    def inputs(self, processor: Processor) -> Inputs:
        """Model inputs of the query, batch 1. Raises UserError for special tokens in the question."""
        return processor([self.question], [[] if self.pixels is None else [self.pixels]])
