"""Any picture file to an RGB square of a given side, in bounded memory. Knows no model and no normalisation.

The whole picture is kept: it is scaled to fit (bicubic, antialiased) and centred on white, like the drawings
that the bundled model was trained on. A picture that already has the side is not touched.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    IcoImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from microvlm.errors import UserError

# A list of its own, because Pillow would also hand some formats to other programs.
_PLUGINS = (
    PngImagePlugin.PngImageFile,
    JpegImagePlugin.JpegImageFile,
    GifImagePlugin.GifImageFile,
    WebPImagePlugin.WebPImageFile,
    BmpImagePlugin.BmpImageFile,
    TiffImagePlugin.TiffImageFile,
    PpmImagePlugin.PpmImageFile,
    IcoImagePlugin.IcoImageFile,
)
FORMATS = tuple(plugin.format for plugin in _PLUGINS)
MAX_DECODED_PIXELS = 25_000_000
"""Pixels held at once: 100 MB at four bytes each. A sequential JPEG may be larger: it is decoded at a fraction."""

ImageSource: TypeAlias = str | Path | Image.Image | np.ndarray

_JPEG_MAGIC = b"\xff\xd8\xff"
_ORIENTATION = 0x0112
_STRIP_PIXELS = 1 << 20
_TURNS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_270,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_90,),
}


def load_square(source: ImageSource, side: int) -> Image.Image:
    """A path, a Pillow image or a uint8 array [H, W, 3] -> RGB, side x side. UserError for a bad picture."""
    if isinstance(source, np.ndarray):
        return fit_square(Image.fromarray(source), side)
    if isinstance(source, Image.Image):
        return fit_square(source, side)
    name, path = str(source), Path(source)
    check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open(path) as image:
                if "progression" in image.info:
                    # All its coefficients are held at full size, 3 to 6 bytes a pixel, whatever it is decoded to.
                    _check_size(name, image)
                extent = _reduce_while_decoding(image, side)
                _check_size(name, image)
                return fit_square(image, side, extent)
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{name} is not a picture in a format read here ({', '.join(FORMATS)}).") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name} is far too large a picture; scale it down first.") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds; each means that the file is bad
        reason = str(error).split("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(f"{name} is a damaged picture ({reason}); copy it again.") from None


def fit_square(image: Image.Image, side: int, extent: tuple[float, float] | None = None) -> Image.Image:
    """The first frame, upright, on white, scaled to fit and centred: RGB, side x side.

    `extent`: how many of the image's pixels the picture takes, where its last row and column are no whole ones.
    """
    # Pillow turns a TIFF itself while it decodes, and takes the tag away then: the tag counts once all is decoded.
    image.load()
    orientation = _orientation(image)
    factor = max(1, max(image.size) // (2 * side))
    small = _shrink_to_rgb(image, factor)
    whole = extent or image.size
    scale = side / max(whole)
    # Size and box come from the whole picture: the shrunken one is rounded up, and would be stretched by a pixel.
    width, height = (max(1, min(side, round(length * scale))) for length in whole)
    if small.size != (width, height):
        box = (0, 0, whole[0] / factor, whole[1] / factor)
        small = small.resize((width, height), Image.Resampling.BICUBIC, box)
    for turn in _TURNS.get(orientation, ()):
        small = small.transpose(turn)
    if small.size == (side, side):
        return small
    square = Image.new("RGB", (side, side), "white")
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square


def check_file(source: str | Path) -> None:
    """Raises UserError unless `source` is a file with something in it. Cheap: nothing is decoded."""
    name, path = str(source), Path(source)
    if path.is_dir():
        raise UserError(f"{name} is a folder; give a picture file.")
    if not path.exists():
        raise UserError(f"{name} does not exist; give a picture file.")
    if not path.is_file():
        raise UserError(f"{name} is not a regular file; give a picture file.")
    try:
        empty = path.stat().st_size == 0
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}).") from None
    if empty:
        raise UserError(f"{name} is empty (0 bytes); copy it again.")


def _open(path: Path) -> Image.Image:
    try:
        with path.open("rb") as file:
            is_jpeg = file.read(3) == _JPEG_MAGIC
    except PermissionError:
        raise UserError(f"{path} may not be read by this user; change its permissions.") from None
    if is_jpeg:
        # Image.open refuses by the full size, which a reduced decoding never holds.
        return JpegImagePlugin.JpegImageFile(str(path))
    return Image.open(path, formats=FORMATS)


def _reduce_while_decoding(image: Image.Image, side: int) -> tuple[float, float] | None:
    """Let libjpeg decode at 1/2, 1/4 or 1/8, still at least twice the side. Returns the exact size it then has.

    A photograph of 12 megapixels then takes 2 MB instead of 48. Its scaled inverse transform is a box filter over
    the same pixels that `_shrink_to_rgb` would average: a value differs by at most 6 of 255, and by 1 in the mean.
    """
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        scale = 2 * side / max(image.size)
        wanted = max(1, int(image.width * scale)), max(1, int(image.height * scale))
        drafted = image.draft("RGB", wanted)
        return drafted and drafted[1][2:]
    return None


def _check_size(name: str, image: Image.Image) -> None:
    if image.width * image.height > MAX_DECODED_PIXELS:
        raise UserError(
            f"{name} is {image.width} x {image.height} pixels when decoded, more than the "
            f"{MAX_DECODED_PIXELS // 1_000_000} million held here; scale it down first."
        )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata of a good picture: it is shown as stored
        return 1


def _shrink_to_rgb(image: Image.Image, factor: int) -> Image.Image:
    """Box-reduced by an integer factor, strip by strip, so that only the stored form is held at full size."""
    is_deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    span = cast("tuple[float, float]", image.getextrema()) if is_deep else None
    if factor == 1 and image.width * image.height <= _STRIP_PIXELS:
        return _to_rgb(image, span)
    rows = max(1, _STRIP_PIXELS // image.width // factor) * factor
    small = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        strip.info = image.info
        small.paste(_to_rgb(strip, span).reduce(factor), (0, top // factor))
    return small


def _to_rgb(image: Image.Image, span: tuple[float, float] | None) -> Image.Image:
    """Any mode to RGB: transparent parts white, deep greys scaled by the span of the whole picture."""
    if span is not None:
        return _deep_grey(np.asarray(image), span, image.info.get("transparency"))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _deep_grey(values: np.ndarray, span: tuple[float, float], transparent: object) -> Image.Image:
    """16-bit by its range; other numbers by the narrowest of 0..1, 0..255, 0..65535 or their own span.

    Pixels of the value `transparent` become white.
    """
    low, high = float(span[0]), float(span[1])
    if values.dtype.itemsize == 2:
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 65535:
        is_unit = values.dtype.kind == "f" and high <= 1
        low, high = 0.0, 1.0 if is_unit else 255.0 if high <= 255 else 65535.0
    scaled = (np.nan_to_num(values.astype(np.float32)) - low) * (255.0 / max(high - low, 1e-12))
    bytes8 = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    if isinstance(transparent, int):
        bytes8[values == transparent] = 255
    return Image.fromarray(bytes8).convert("RGB")
