"""What a row of the memory is written under: the words of a question and the picture in view, as the model gets both.

Two are the same when the words are, and the pixels: that is whole numbers on every backend, where keys differ in bits.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from microvlm.inputs.images import ImageSource, load_square
from microvlm.inputs.processor import Inputs, Processor


class Asked(NamedTuple):
    """One question, about one picture or none."""

    question: str
    pixels: np.ndarray | None = None
    """uint8 [side, side, 3], the picture as the model is shown it."""

    @classmethod
    def about(cls, processor: Processor, question: str, image: ImageSource | None) -> Asked:
        """The words as the model reads them; the picture, read and scaled once. Raises UserError for a bad one."""
        side = processor.config.vision.image_size
        question = processor.fold(question)
        return cls(question, None if image is None else np.asarray(load_square(image, side)))

    @property
    def picture(self) -> str:
        """sha256 of the pixels in hexadecimal; empty without a picture."""
        return "" if self.pixels is None else hashlib.sha256(self.pixels.tobytes()).hexdigest()

    def inputs(self, processor: Processor) -> Inputs:
        """What a model is asked it with, batch 1. Raises UserError."""
        return processor([self.question], [[] if self.pixels is None else [self.pixels]])
