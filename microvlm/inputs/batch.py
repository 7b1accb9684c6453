"""A batch for `generate`: pairs images with prompts, and repeats a single one for a list of the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from microvlm.config import VisionConfig
from microvlm.errors import UserError
from microvlm.inputs.images import ImageSource, is_image, load_square

Images: TypeAlias = ImageSource | list[Any] | tuple[Any, ...]
"""One image, or a list with one image or a list of images per prompt."""
Prompts: TypeAlias = str | list[str] | tuple[str, ...]
"""One text or a list of texts."""


@dataclass(frozen=True)
class Batch:
    """Prompts and the images of each, as a `Processor` takes them."""

    prompts: list[str]
    images: list[list[np.ndarray]]
    """Per prompt its images, uint8 [side, side, 3]."""
    is_single: bool
    """Whether neither images nor prompts were a list, so that the result is one answer."""


def build_batch(
    images: Images | None, prompts: Prompts | None, default_prompt: str, vision: VisionConfig
) -> Batch:
    """Load every image once and pair it with its prompt.

    A single image goes with every prompt of a list, and a single prompt with every image. Lists of both must be equally
    long. Without prompts every image gets `default_prompt`. Raises UserError for everything else.
    """
    if images is None and prompts is None:
        raise UserError("give images=, prompts= or both.")
    texts = _texts(default_prompt if prompts is None else prompts)
    rows = [[]] if images is None else _rows(images, vision)
    has_many_images, has_many_prompts = isinstance(images, list | tuple), not isinstance(prompts, str | None)
    if not (has_many_images and has_many_prompts):
        count = max(len(texts), len(rows))
        texts = texts * count if len(texts) == 1 else texts
        rows = rows * count if len(rows) == 1 else rows
    if len(texts) != len(rows):
        raise UserError(
            f"images= has {len(rows)} entries and prompts= has {len(texts)}: give as many of both, or a single one."
        )
    return Batch(texts, rows, not (has_many_images or has_many_prompts))


def _texts(prompts: Prompts) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError("prompts= takes one text or a list of texts.")
    if not texts:
        raise UserError("prompts= is an empty list: give at least one text.")
    if not all(text.strip() for text in texts):
        raise UserError("a prompt is empty: write a question, or leave prompts= out.")
    return list(texts)


def _rows(images: Images, vision: VisionConfig) -> list[list[np.ndarray]]:
    if is_image(images):
        images = [images]
    if not isinstance(images, list | tuple):
        raise UserError(
            "images= takes one image (a path, bytes, an open binary file, a Pillow image or a uint8 array) or a list "
            f"of images, not {type(images).__name__}."
        )
    if not images:
        raise UserError("images= is an empty list: give at least one image.")
    groups = [list(entry) if isinstance(entry, list | tuple) else [entry] for entry in images]
    side, stretch = vision.image_size, vision.resize == "stretch"
    return [[np.asarray(load_square(image, side, stretch)) for image in group] for group in groups]
