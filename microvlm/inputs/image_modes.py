"""What the samples of a decoded image mean: any mode of Pillow's to 8-bit RGB, laid on white.

| samples | RGB |
|---|---|
| 1, 2, 4 or 8 bits of grey, colour or palette | the file's levels, 0 to 255 |
| 12 or 16 bits of grey | 0 is black, the largest value of that width is white |
| 16 bits of colour | the upper byte |
| other integers, floating point | 0 to the first of 1 (floating point), 255, 65535 that holds all; else their span |
| a TIFF whose 0 is white | the same, inverted |
| C M Y K | (1 - C) (1 - K) and so on; a JPEG is inverted if it has Adobe's marker |
| alpha, a transparent colour or palette entry, pixels outside a GIF's first frame | white shows through |

Refused: CIELAB, values that are not finite, and 16-bit colours of which one is transparent, since the upper byte does
not tell which pixels have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import GifImagePlugin, Image, ImageChops

from microvlm.errors import UserError


class UnreadableImage(UserError):
    """An image whose pixels have no known colour. `reason` is the sentence after the image's name."""

    def __init__(self, reason: str):
        super().__init__(f"the image {reason}")
        self.reason = reason


ToRgb = Callable[[Image.Image], Image.Image]
"""Converts a part of an image to RGB."""
_STRIP_PIXELS = 1 << 20
_PHOTOMETRIC, _BITS_PER_SAMPLE, _SAMPLE_FORMAT = 262, 258, 339
_GREY_STEPS = {"L;2": 85, "L;4": 17}
"""Pillow's raw modes of PNG greys below 8 bits, and what it multiplies their samples by."""


def shrink_to_rgb(image: Image.Image, factor: int) -> Image.Image:
    """Reduce the first frame by an integer factor with a box filter -> RGB, rounded up, on white.

    Works in strips: only the stored form exists at full size. Raises UnreadableImage for colours that are not known,
    and what Pillow raises for a damaged image.
    """
    transparency = _scaled_transparency(image)
    _load(image)
    image, transparency = _complete_frame(image, transparency)
    to_rgb = _converter(image, transparency)
    small = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top, strip in _strips(image, factor):
        if transparency is None:
            strip.info.pop("transparency", None)
        else:
            strip.info["transparency"] = transparency
        rgb = to_rgb(strip)
        small.paste(rgb.reduce(factor) if factor > 1 else rgb, (0, top // factor))
    return small


def _load(image: Image.Image) -> None:
    """Decode, by reading: mapping a file (`_open_image`) gives some turned TIFFs the wrong width."""
    name = getattr(image, "filename", None)
    try:
        if name:
            image.filename = ""  # type: ignore[attr-defined]
        image.load()
    finally:
        if name:
            image.filename = name  # type: ignore[attr-defined]


def _strips(image: Image.Image, factor: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """(first row, copy of the rows from it on), each of a multiple of `factor` rows and about `_STRIP_PIXELS`."""
    rows = max(1, _STRIP_PIXELS // image.width // factor) * factor
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(image.height, top + rows)))


def _scaled_transparency(image: Image.Image) -> Any:
    """The transparent colour as a value of the decoded samples. Called before `load`, which forgets their raw mode.

    Pillow gives a PNG's colour as it stands in the file, multiplies samples below 8 bits while it decodes them, and
    keeps the upper byte of 16-bit colours only. Raises UnreadableImage for a transparent one of those.
    """
    transparency = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    raw_mode = str(tiles[0][3]) if tiles and image.format == "PNG" else ""
    if isinstance(transparency, tuple) and (raw_mode == "RGB;16B" or max(transparency) > 255):
        raise UnreadableImage(
            "has a transparent colour of 16 bits, which is not read here; save it with an alpha channel."
        )
    if isinstance(transparency, int) and image.mode == "L":
        return transparency * _GREY_STEPS.get(raw_mode, 1)
    return transparency


def _complete_frame(image: Image.Image, transparency: Any) -> tuple[Image.Image, Any]:
    """A GIF whose first frame covers a part of it: that part, on white. Pillow fills the rest with any entry."""
    if not isinstance(image, GifImagePlugin.GifImageFile) or image.tell():
        return image, transparency
    place = image.dispose_extent
    if place is None or tuple(place) == (0, 0, *image.size):
        return image, transparency
    part = image.crop(place)
    whole = Image.new("RGB", image.size, "white")
    whole.paste(_converter(part, transparency)(part), place[:2])
    return whole, None


def _converter(image: Image.Image, transparency: Any) -> ToRgb:
    """Decide what the samples of `image` mean -> the function for each of its strips. One branch for every mode."""
    if image.mode == "LAB":
        raise UnreadableImage("has CIELAB colours, which are not read here; save it in RGB.")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        black, white = _range(image)
        return lambda strip: _deep_grey(_samples(image, strip), black, white, transparency)
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        return lambda strip: ImageChops.invert(strip).convert("RGB")  # Pillow takes every file for Adobe's
    if image.has_transparency_data or transparency is not None:
        return _lay_on_white
    return lambda strip: strip.convert("RGB")


def _lay_on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow converts this one in two steps only
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _tag(image: Image.Image, number: int) -> int | None:
    """The (first) value of a TIFF's tag, None for other images."""
    value = getattr(image, "tag_v2", {}).get(number)
    value = value[0] if isinstance(value, tuple) and value else value
    return int(value) if isinstance(value, int | float) else None


def _samples(image: Image.Image, strip: Image.Image) -> np.ndarray:
    """The deep samples of a strip, in native byte order."""
    values = np.asarray(strip)
    if values.dtype == np.int32 and _tag(image, _SAMPLE_FORMAT) == 1:
        return values.view(np.uint32)  # Pillow has no unsigned mode of 32 bits
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _range(image: Image.Image) -> tuple[float, float]:
    """The samples of black and white in a grey image of more than 8 bits.

    Raises UnreadableImage for NaN and infinity.
    """
    low, high = 0.0, 65535.0
    if image.mode.startswith("I;16"):
        high = 2.0 ** (_tag(image, _BITS_PER_SAMPLE) or 16) - 1
    elif not (image.mode == "I" and image.format == "PPM"):  # a Netpbm file's were scaled to 16 bits
        ends = [(s.min(), s.max()) for s in (_samples(image, strip) for _, strip in _strips(image))]
        low, high = float(min(low for low, _ in ends)), float(max(high for _, high in ends))
        if not np.isfinite([low, high]).all():
            raise UnreadableImage("has values that are not finite, which have no colour; give another one.")
        if low >= 0 and high <= 65535:
            is_unit = image.mode == "F" and high <= 1
            low, high = 0.0, 1.0 if is_unit else 255.0 if high <= 255 else 65535.0
    return (high, low) if _tag(image, _PHOTOMETRIC) == 0 else (low, high)


def _deep_grey(values: np.ndarray, black: float, white: float, transparency: Any) -> Image.Image:
    """Scale deep grey samples to 8 bits. Pixels with the sample `transparency` become white."""
    span = white - black
    if abs(span) < 1e-12:
        span = 1e-12
    scaled = (values.astype(np.float32) - black) * (255.0 / span)
    bytes8 = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    if isinstance(transparency, int):
        bytes8[values == transparency] = 255
    return Image.fromarray(bytes8).convert("RGB")
