"""Loads an image as an RGB square of a given side, in bounded memory. Knows no model and no normalisation.

The whole image is kept: it is scaled to fit (bicubic, antialiased) and centred on white, or stretched for a
model that was trained so. An image that already has the side is not resampled. `load_scaled` and `load_within` keep an
image's own shape, and `load_within` enlarges nothing.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from collections.abc import Callable
from typing import BinaryIO, NamedTuple, TypeAlias, TypeVar

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
from microvlm.escaping import printable
from microvlm.inputs.image_modes import UnreadableImage, shrink_to_rgb

# An explicit list, because Pillow would run external programs for some other formats.
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
"""The most pixels of one decoded file: 100 MB at four bytes each. A sequential JPEG may be larger, because it is
decoded at a fraction of its size."""

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray
"""One image: a path, an image file's bytes, an open binary file, a Pillow image, or a uint8 array: grey [H, W],
RGB [H, W, 3] or RGBA [H, W, 4]."""
T = TypeVar("T")
_Scaling: TypeAlias = Callable[[Image.Image, int, tuple[float, float] | None], Image.Image]
"""(decoded image, side, its exact width and height or None) -> the scaled image."""

_JPEG_MAGIC = b"\xff\xd8\xff"
_ICON_MAGIC = b"\0\0\1\0"
_ORIENTATION = 0x0112
_TURNS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_270,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_90,),
}


class NotAPicture(UserError):
    """Content in none of the formats that are read."""


class TooLargePicture(UserError):
    """A picture of more pixels than are held."""


def is_image(value: object) -> bool:
    """Whether `value` has the type of an `ImageSource`. It may still be a bad image."""
    return isinstance(value, str | os.PathLike | bytes | Image.Image | np.ndarray) or hasattr(value, "read")


def load_square(source: ImageSource, side: int, stretch: bool = False) -> Image.Image:
    """Load one image -> Pillow image, RGB, side x side. Raises UserError for a bad one and for another type.

    stretch : scale each side to `side`, instead of the longer one and white beside it.
    """
    return _load(source, side, lambda image, side, extent: fit_square(image, side, extent, stretch))


def load_scaled(source: ImageSource, side: int) -> Image.Image:
    """Load one image in its own shape -> RGB, the longer side `side`. Raises UserError as `load_square` does."""
    return _load(source, side, _fit)


def _load(source: ImageSource, side: int, fit: _Scaling) -> Image.Image:
    if not is_image(source):
        raise UserError(
            "an image is a path, the bytes of an image file, an open binary file, a Pillow image or a uint8 array, "
            f"not {type(source).__name__}."
        )
    if isinstance(source, np.ndarray):
        return fit(_from_array(source), side, None)
    if isinstance(source, Image.Image):
        return _decode("the Pillow image", lambda: fit(source, side, None))
    if isinstance(source, str | os.PathLike):
        check_file(source)
        return _load_file(printable(str(source)), lambda: _open_path(source), side, fit)
    content = source if isinstance(source, bytes) else source.read()
    name = printable(str(getattr(source, "name", "the image")))
    if not isinstance(content, bytes):
        raise UserError(f"{name} is open as text; open image files in binary mode ('rb').")
    if not content:
        raise UserError(f"{name} is empty (0 bytes); a file that was read before needs seek(0).")
    return _load_file(name, lambda: io.BytesIO(content), side, fit)


class UprightPicture(NamedTuple):
    """A decoded picture, and what its file says."""

    image: Image.Image
    """RGB, upright, on white."""
    width: int
    height: int
    """Pixels of the file's picture as it is stored, before it is turned upright."""
    format: str
    """One of `FORMATS`."""


def load_within(content: bytes, side: int, name: str = "the picture") -> UprightPicture:
    """Decode the bytes of a picture file completely -> RGB with its own shape, no side longer than `side` pixels.

    Raises UserError for a bad one: `NotAPicture`, `TooLargePicture`, `UnreadableImage`, or any other for damage.
    """
    facts: list[tuple[int, int, str]] = []

    def fit(image: Image.Image, side: int, extent: tuple[float, float] | None) -> Image.Image:
        return _fit(image, min(side, max(facts[0][:2])), extent)

    image = _load_file(name, lambda: io.BytesIO(content), side, fit, facts)
    return UprightPicture(image, *facts[0])


def size_of(content: bytes, name: str = "the picture") -> tuple[int, int]:
    """Width and height in pixels that the bytes of a picture file state. Raises UserError as `load_within` does."""
    return _stated_size(name, lambda: io.BytesIO(content))


def size_of_file(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height in pixels that a picture file states. Raises UserError as `load_within` does."""
    check_file(path)
    return _stated_size(printable(str(path)), lambda: _open_path(path))


def _stated_size(name: str, open_file: Callable[[], BinaryIO]) -> tuple[int, int]:
    def read() -> tuple[int, int]:
        with warnings.catch_warnings(), open_file() as file, _open_image(file) as image:
            warnings.simplefilter("ignore")
            return image.size

    return _decode(name, read)


def _from_array(array: np.ndarray) -> Image.Image:
    channels = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
    if array.dtype != np.uint8 or channels not in (1, 3, 4) or array.size == 0 or array.shape[2:] == (1,):
        raise UserError(
            f"an image array is uint8 [H, W], [H, W, 3] or [H, W, 4], not {array.dtype} {list(array.shape)}; "
            "give several images as a list of arrays."
        )
    return Image.fromarray(array)


def _load_file(
    name: str,
    open_file: Callable[[], BinaryIO],
    side: int,
    fit: _Scaling,
    facts: list[tuple[int, int, str]] | None = None,
) -> Image.Image:
    """Decode a file and let `fit` scale it. Its width, height and format are appended to `facts`."""

    def load() -> Image.Image:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_file() as file, _open_image(file) as image:
                if facts is not None:
                    facts.append((*image.size, str(image.format)))
                if "progression" in image.info:
                    # libjpeg holds all its coefficients at full size, 3 to 6 bytes a pixel, at any decoded size.
                    _check_size(name, image)
                extent = _reduce_while_decoding(image, side)
                _check_size(name, image)
                return fit(image, side, extent)

    return _decode(name, load)


def _decode(name: str, load: Callable[[], T]) -> T:
    """Run `load`, whose errors become one sentence about the image `name`."""
    try:
        return load()
    except UnreadableImage as error:
        raise UserError(f"{name} {error.reason}") from None
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise NotAPicture(f"{name} is not a picture in a format read here ({', '.join(FORMATS)}).") from None
    except Image.DecompressionBombError:
        raise TooLargePicture(f"{name} is far too large a picture; scale it down first.") from None
    except Exception as error:  # Pillow's decoders raise a dozen types; each means that the file is bad
        reason = str(error).split("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(f"{name} is a damaged picture ({reason}); copy it again.") from None


def fit_square(
    image: Image.Image, side: int, extent: tuple[float, float] | None = None, stretch: bool = False
) -> Image.Image:
    """Turn the first frame upright, scale it to fit and centre it on white, or stretch it -> RGB, side x side.

    `extent`: the exact width and height in pixels of an image whose last row and column are fractions of a pixel.

    Raises UnreadableImage for an image without pixels and as `shrink_to_rgb` does.
    """
    small = _fit(image, side, extent, stretch)
    if small.size == (side, side):
        return small
    square = Image.new("RGB", (side, side), "white")
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square


def _fit(
    image: Image.Image, side: int, extent: tuple[float, float] | None = None, stretch: bool = False
) -> Image.Image:
    """Turn the first frame upright and scale it until its longer side, or each side, is `side` -> RGB."""
    if not (image.width and image.height):
        raise UnreadableImage("has no pixels; give another one.")
    factor = max(1, max(image.size) // (2 * side))
    small = shrink_to_rgb(image, factor)
    # Pillow turns a TIFF while it decodes it, and then removes the tag: read the tag after decoding.
    orientation = _orientation(image)
    whole = extent or image.size
    scale = side / max(whole)
    # Size and box come from the exact size: the reduced image is rounded up, and would be stretched by a pixel.
    width, height = (side if stretch else max(1, min(side, round(length * scale))) for length in whole)
    if small.size != (width, height):
        box = (0, 0, whole[0] / factor, whole[1] / factor)
        small = small.resize((width, height), Image.Resampling.BICUBIC, box)
    for turn in _TURNS.get(orientation, ()):
        small = small.transpose(turn)
    return small


def check_file(source: str | os.PathLike[str]) -> None:
    """Raise UserError unless `source` is a regular file that is not empty. Decodes nothing."""
    name = printable(str(source))
    try:
        status = os.stat(source)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null character
        raise UserError(f"{name} does not exist; give a picture file.") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}).") from None
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{name} is a folder; give a picture file.")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{name} is not a regular file; give a picture file.")
    if status.st_size == 0:
        raise UserError(f"{name} is empty (0 bytes); copy it again.")


def _open_path(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        return open(path, "rb")
    except PermissionError:
        raise UnreadableImage("may not be read by this user; change its permissions.") from None


def _open_image(file: BinaryIO) -> Image.Image:
    """Open an image. Not by its path: Pillow would map the file, and map some turned TIFFs with the wrong width."""
    magic = file.read(4)
    if magic == _ICON_MAGIC:
        _check_icon(file)
    file.seek(0)
    if magic.startswith(_JPEG_MAGIC):
        # Image.open checks the full size, which a reduced decoding never holds.
        return JpegImagePlugin.JpegImageFile(file)
    return Image.open(file, formats=FORMATS)


def _check_icon(file: BinaryIO) -> None:
    """Raise DecompressionBombError if an image of an icon, after its magic number, has more pixels than are held.

    Pillow decodes an icon when it opens it, and reads the size in the icon's table, which need not be the image's.
    """
    (count,) = struct.unpack("<H", file.read(2).ljust(2, b"\0"))
    for entry in [file.read(16) for _ in range(count)]:
        if len(entry) < 16:
            return
        file.seek(struct.unpack("<I", entry[12:])[0])
        header = file.read(24).ljust(24, b"\0")
        is_png = header.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", header[16:]) if is_png else struct.unpack("<ii", header[4:12])
        if abs(width * height) > (MAX_DECODED_PIXELS if is_png else 2 * MAX_DECODED_PIXELS):
            raise Image.DecompressionBombError


def _reduce_while_decoding(image: Image.Image, side: int) -> tuple[float, float] | None:
    """Let libjpeg decode at 1/2, 1/4 or 1/8 of the size, at least twice the side -> the exact decoded size.

    A photograph of 12 megapixels then takes 2 MB instead of 48. The scaled inverse transform is a box filter over the
    pixels that `shrink_to_rgb` would average: a value differs by at most 6 of 255, and by 1 on average.
    """
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        scale = 2 * side / max(image.size)
        target_size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
        draft = image.draft("RGB", target_size)
        return draft and draft[1][2:]
    return None


def _check_size(name: str, image: Image.Image) -> None:
    if image.width * image.height > MAX_DECODED_PIXELS:
        raise TooLargePicture(
            f"{name} is {image.width} x {image.height} pixels when decoded, more than the "
            f"{MAX_DECODED_PIXELS // 1_000_000} million held here; scale it down first."
        )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata of a good image: keep the stored orientation
        return 1
