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
from microvlm.memory.ordinal_questions import ORDINALS, ordinal_question, place_asked_for

_QUESTION_WORDS = (
    *("who", "whose", "whom", "what", "when", "where", "which", "why", "how"),
    *("is", "are", "was", "were", "do", "does", "did", "can"),
)


def normalize_question(processor: Processor, question: str) -> str:
    """The words by which a query is known: `Processor.normalize_text`, and a question mark that was left out.

    A question for an image by its place gets the words under which a conversation writes it.
    """
    words = processor.normalize_text(question)
    place = place_asked_for(words)
    if place is not None and place < len(ORDINALS):
        return ordinal_question(place)
    first, _, rest = words.partition(" ")
    is_question = first.lower() in _QUESTION_WORDS and "?" not in words and rest[-1:].isalnum()
    return f"{words}?" if is_question else words


class Query(NamedTuple):
    """One question, about one image or none."""

    question: str
    """The normalized words."""
    pixels: np.ndarray | None = None
    """uint8 [side, side, 3], the image at the size that the model sees."""

    @classmethod
    def build(cls, processor: Processor, question: str, image: ImageSource | None) -> Query:
        """Normalize the words and scale the image, which is read once. Raises UserError for a bad image."""
        vision = processor.config.vision
        pixels = None
        if image is not None:
            pixels = np.asarray(load_square(image, vision.image_size, vision.resize == "stretch"))
        return cls(normalize_question(processor, question), pixels)

    @property
    def picture(self) -> str:
        """Hexadecimal sha256 of the pixels; empty without an image."""
        return "" if self.pixels is None else hashlib.sha256(self.pixels.tobytes()).hexdigest()

    def captioned(self, processor: Processor) -> Query:
        """The query for a caption of the same image."""
        return self._replace(question=processor.normalize_text(processor.config.prompt.caption_prompt))

    def inputs(self, processor: Processor) -> Inputs:
        """Model inputs of the query, batch 1. Raises UserError for special tokens in the question."""
        return processor([self.question], [[] if self.pixels is None else [self.pixels]])
