"""Views of a picture file for training: a random crop with a little other light; never mirrored, because texts say
"left" and "right".
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageEnhance

from microvlm.config import VisionConfig
from microvlm.errors import UserError
from microvlm.inputs.images import load_square

SMALLEST_CROP = 0.6
"""Least share of the picture's area in a crop at strength 1."""
ASPECT = 1.25
LIGHT = 0.2
"""Largest relative change of brightness, contrast and colour at strength 1."""
CROPPED_SHARE = 0.7
"""Share of the views that are crops; the others show the whole picture, as at inference."""


def plain_view(content: bytes, vision: VisionConfig) -> np.ndarray:
    """The picture as inference sees it, uint8 [side, side, 3]. Raises UserError for a bad picture."""
    return np.asarray(load_square(content, vision.image_size, vision.resize == "stretch"))


def random_view(
    content: bytes, vision: VisionConfig, rng: np.random.Generator, strength: float
) -> np.ndarray:
    """A random view, uint8 [side, side, 3]; the plain one at strength 0. Raises UserError for a bad picture."""
    return draw_view(content, vision, view_draws(rng), strength)


def view_draws(rng: np.random.Generator) -> np.ndarray:
    """The numbers float64 [8] in 0..1 that choose a view. They do not depend on the picture."""
    return rng.random(8)


def draw_view(content: bytes, vision: VisionConfig, draws: np.ndarray, strength: float) -> np.ndarray:
    """The view that `draws` choose, as `random_view` returns it. Raises UserError for a bad picture."""
    if strength <= 0:
        return plain_view(content, vision)
    side, stretch = vision.image_size, vision.resize == "stretch"
    # The loader keeps the whole picture: a crop is taken from a larger square, inside of the picture.
    square = load_square(content, round(side * 1.4), stretch)
    if draws[0] < CROPPED_SHARE * min(1.0, strength):
        extent = (1.0, 1.0) if stretch else _extent(content)
        square = _crop(square, extent, draws[1:5], strength, stretch)
    view = square.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    for enhance, draw in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), draws[5:8], strict=True
    ):
        view = enhance(view).enhance(1 + (2 * draw - 1) * LIGHT * strength)
    return np.asarray(view)


def _extent(content: bytes) -> tuple[float, float]:
    """Width and height of the picture's part of its square, as shares of the side."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) >= 5:
                width, height = height, width
    except (OSError, ValueError, SyntaxError):
        raise UserError("a picture of the data set cannot be read: build the data folder again.") from None
    longer = max(width, height)
    return width / longer, height / longer


def _crop(
    square: Image.Image, extent: tuple[float, float], draws: np.ndarray, strength: float, stretch: bool
) -> Image.Image:
    side = square.width
    area = 1 - draws[0] * (1 - SMALLEST_CROP) * min(1.0, strength)
    aspect = ASPECT ** (2 * draws[1] - 1)
    width = min(1.0, (area * aspect) ** 0.5) * extent[0] * side
    height = min(1.0, (area / aspect) ** 0.5) * extent[1] * side
    left = (1 - extent[0]) / 2 * side + draws[2] * (extent[0] * side - width)
    top = (1 - extent[1]) / 2 * side + draws[3] * (extent[1] * side - height)
    part = square.crop(tuple(map(round, (left, top, left + max(1.0, width), top + max(1.0, height)))))
    if stretch:
        return part
    longer = max(part.size)
    padded = Image.new("RGB", (longer, longer), "white")
    padded.paste(part, ((longer - part.width) // 2, (longer - part.height) // 2))
    return padded
