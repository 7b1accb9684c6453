"""Small encoders of picture files, and the table of every kind of picture with the pixels that it must become.

A row's file is written by `picture_encoders` from a source array; its expected pixels are computed from that array by
the formula that stands in the row. Pillow writes only the JPEG and WebP files, whose expected pixels come from the
source array too, within a tolerance.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import PIL
from picture_encoders import (
    TIFF_BIG,
    TIFF_LITTLE,
    bmp,
    exif,
    gif,
    ico,
    icon_bitmap,
    pack_rows,
    png,
    png_chunk,
    tiff,
)
from PIL import Image

SIDE = 32
"""The side of the square that rows are loaded as: sources of that width are not resampled."""

FIRST_PILLOW = {"cmyk16-be": (11, 0), "grey-x": (13, 0), "grey-premultiplied": (13, 0)}
"""Beginning of a row's name -> the first version of Pillow that is known to open its kind."""


class PictureRow(NamedTuple):
    """One kind of picture."""

    name: str
    """The file's name."""
    content: bytes
    expected: np.ndarray | str
    """uint8 [SIDE, SIDE, 3], or words of the sentence that refuses the file."""
    tolerance: int = 0
    """The largest difference of a value."""


def colours(height: int = 20, width: int = SIDE) -> np.ndarray:
    """uint8 [height, width, 3]: blocks of 4 x 4 pixels of different colours, without a symmetry."""
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 256, (-(-height // 4), -(-width // 4), 3), np.uint8)
    return blocks.repeat(4, 0).repeat(4, 1)[:height, :width]


def samples(bits: int, channels: int = 1, height: int = 20) -> np.ndarray:
    """Integers [height, SIDE, channels] of all `bits`, with both ends of their range."""
    rng = np.random.default_rng(bits * 10 + channels)
    values = rng.integers(0, 1 << bits, (height, SIDE, channels))
    values[0, 0], values[0, 1] = 0, (1 << bits) - 1
    return values


def to_bytes(values: np.ndarray, bits: int) -> np.ndarray:
    """The 8-bit levels of integer samples: 0 stays 0, and the largest value becomes 255."""
    return np.floor(values * (255 / ((1 << bits) - 1)) + 0.5).astype(np.uint8)


def on_white(pixels: np.ndarray, alpha: np.ndarray | None = None) -> np.ndarray:
    """Grey [H, W, 1] or RGB [H, W, 3] of 0..255 -> uint8 [SIDE, SIDE, 3], centred on white.

    `alpha` 0..255, [H, W] or [H, W, 1]: a pixel is colour * alpha + white * (1 - alpha).
    """
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3)).astype(np.float64)
    if alpha is not None:
        share = alpha.reshape(*pixels.shape[:2], 1) / 255
        pixels = pixels * share + 255 * (1 - share)
    square = np.full((SIDE, SIDE, 3), 255, np.uint8)
    top, left = (SIDE - pixels.shape[0]) // 2, (SIDE - pixels.shape[1]) // 2
    square[top : top + pixels.shape[0], left : left + pixels.shape[1]] = np.floor(pixels + 0.5)
    return square


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The array that a file of this EXIF orientation (TIFF 6.0, tag 274) holds of an upright picture [H, W, ...]."""
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    return np.ascontiguousarray(turned)


def pillow_file(pixels: np.ndarray, format: str, **options: object) -> bytes:
    """A file that Pillow writes from an array."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def table() -> list[PictureRow]:
    """Every row of a kind that the installed Pillow opens. An older one refuses some, as no picture it reads."""
    version = tuple(int(number) for number in PIL.__version__.split(".")[:2])
    unknown = [name for name, first in FIRST_PILLOW.items() if version < first]
    return [row for row in all_rows() if not row.name.startswith(tuple(unknown))]


def all_rows() -> Iterator[PictureRow]:
    yield from png_rows()
    yield from png_transparency_rows()
    yield from tiff_rows()
    yield from deep_rows()
    yield from bmp_rows()
    yield from gif_and_ico_rows()
    yield from netpbm_rows()
    yield from jpeg_and_webp_rows()
    yield from orientation_rows()
    yield from refused_rows()


def png_rows() -> Iterator[PictureRow]:
    """Colour types and depths without transparency, and the alpha channel."""
    for interlaced in (False, True):
        kind = "-interlaced" * interlaced
        for bits in (1, 2, 4, 8, 16):  # grey: round(v * 255 / (2^bits - 1))
            values = samples(bits)
            content = png(values, bits, 0, interlaced=interlaced)
            yield PictureRow(f"grey{bits}{kind}.png", content, on_white(to_bytes(values, bits)))
        for bits in (1, 2, 4, 8):  # palette: the entry of the index
            values = samples(bits)
            palette = np.random.default_rng(bits).integers(0, 256, (1 << bits, 3), np.uint8)
            content = png(values, bits, 3, palette=palette.tobytes(), interlaced=interlaced)
            yield PictureRow(f"palette{bits}{kind}.png", content, on_white(palette[values[..., 0]]))
        for bits in (8, 16):  # Pillow keeps the upper byte of 16-bit colours: at most one level off
            for colour_type, channels, words in ((2, 3, "rgb"), (4, 2, "grey-alpha"), (6, 4, "rgba")):
                values = samples(bits, channels)
                colour = to_bytes(values[..., : 1 if channels == 2 else 3], bits)
                alpha = to_bytes(values[..., -1], bits) if channels != 3 else None
                content = png(values, bits, colour_type, interlaced=interlaced)
                tolerance = 2 * (bits == 16) + (alpha is not None)
                yield PictureRow(f"{words}{bits}{kind}.png", content, on_white(colour, alpha), tolerance)


def png_transparency_rows() -> Iterator[PictureRow]:
    """One transparent grey, colour or palette entry (tRNS): it is white, and its neighbours are not."""
    for bits in (1, 2, 4, 8, 16):
        values = samples(bits)
        transparent = 1 + (1 << bits) // 4 if bits > 1 else 1
        values[3, 3], values[4, 4] = (
            transparent,
            transparent ^ 1,
        )  # a neighbour, told apart by the lowest bit only
        expected = on_white(to_bytes(values, bits), 255 * (values != transparent))
        content = png(values, bits, 0, transparency=struct.pack(">H", transparent))
        yield PictureRow(f"grey{bits}-trns.png", content, expected)
    values = samples(8, 3)
    values[3:6, 3:6] = values[3, 3]
    transparent = values[3, 3].copy()
    values[4, 4, 2] ^= 1
    expected = on_white(values, 255 * (values != transparent).any(-1))
    content = png(values, 8, 2, transparency=transparent.astype(">u2").tobytes())
    yield PictureRow("rgb8-trns.png", content, expected)
    for bits in (1, 2, 4, 8):
        values = samples(bits)
        palette = np.random.default_rng(bits).integers(0, 256, (1 << bits, 3), np.uint8)
        alpha = np.random.default_rng(bits + 9).integers(0, 256, 1 << bits).astype(np.uint8)
        alpha[0], alpha[-1] = 0, 255
        expected = on_white(palette[values[..., 0]], alpha[values])
        content = png(values, bits, 3, palette=palette.tobytes(), transparency=alpha.tobytes())
        yield PictureRow(f"palette{bits}-trns.png", content, expected, 1)
        one = alpha * 0 + 255
        one[1] = 0
        content = png(values, bits, 3, palette=palette.tobytes(), transparency=one[:2].tobytes())
        yield PictureRow(f"palette{bits}-one.png", content, on_white(palette[values[..., 0]], one[values]))


def tiff_rows() -> Iterator[PictureRow]:
    """Photometric interpretations (0 white is zero, 1 black is zero, 2 RGB, 3 palette, 5 CMYK), storage and alpha."""
    for order, end in ((TIFF_LITTLE, "le"), (TIFF_BIG, "be")):
        for bits in (1, 2, 4, 8):
            values = samples(bits)
            grey = to_bytes(values, bits)
            yield PictureRow(f"grey{bits}-{end}.tif", tiff(values, bits, 1, order=order), on_white(grey))
            content = tiff(values, bits, 0, order=order)
            yield PictureRow(f"white-is-zero{bits}-{end}.tif", content, on_white(255 - grey))
        rgb = colours()
        for words, options in (
            ("", {}),
            ("-planar", {"planar": True}),
            ("-deflate", {"compressed": True}),
            ("-predictor", {"compressed": True, "predictor": True}),
            ("-pages", {"pages": 3}),
        ):
            content = tiff(rgb.astype(int), 8, 2, order=order, **options)
            yield PictureRow(f"rgb{words}-{end}.tif", content, on_white(rgb))
        for bits in (8, 16):
            values = samples(bits, 4)
            colour, alpha = to_bytes(values[..., :3], bits), to_bytes(values[..., 3], bits)
            tolerance = 1 + 2 * (bits == 16)
            content = tiff(values, bits, 2, order=order, extra=2)
            yield PictureRow(f"rgba{bits}-{end}.tif", content, on_white(colour, alpha), tolerance)
            content = tiff(values, bits, 2, order=order, extra=0)
            yield PictureRow(f"rgbx{bits}-{end}.tif", content, on_white(colour), bits == 16)
            premultiplied = values.copy()
            premultiplied[..., :3] = values[..., :3] * values[..., 3:] // ((1 << bits) - 1)
            expected = on_white(colour, alpha)
            content = tiff(premultiplied, bits, 2, order=order, extra=1)
            yield PictureRow(f"premultiplied{bits}-{end}.tif", content, expected, 4)
            content = tiff(values[..., :3], bits, 2, order=order)
            yield PictureRow(f"rgb{bits}-{end}.tif", content, on_white(colour), bits == 16)
            cmyk = values / ((1 << bits) - 1)  # ink: (1 - c)(1 - k)
            expected = on_white(255 * (1 - cmyk[..., :3]) * (1 - cmyk[..., 3:]))
            content = tiff(values, bits, 5, order=order)
            yield PictureRow(f"cmyk{bits}-{end}.tif", content, expected, 1 + 2 * (bits == 16))
        values = samples(8, 2)
        content = tiff(values, 8, 1, order=order, extra=2)
        yield PictureRow(f"grey-alpha-{end}.tif", content, on_white(values[..., :1], values[..., 1]), 1)
        content = tiff(values, 8, 1, order=order, extra=0)
        yield PictureRow(f"grey-x-{end}.tif", content, on_white(values[..., :1]))
        values[..., 0] = values[..., 0] * values[..., 1] // 255
        expected = on_white(np.minimum(255, values[..., :1] + 255 - values[..., 1:]))
        content = tiff(values, 8, 1, order=order, extra=1)
        yield PictureRow(f"grey-premultiplied-{end}.tif", content, expected, 2)
        for bits in (1, 2, 4, 8):
            values = samples(bits)
            palette = np.random.default_rng(bits).integers(0, 256, (1 << bits, 3), np.uint8)
            colour_map = palette.astype(int).T * 257
            content = tiff(values, bits, 3, order=order, colour_map=colour_map)
            yield PictureRow(f"palette{bits}-{end}.tif", content, on_white(palette[values[..., 0]]))


def deep_rows() -> Iterator[PictureRow]:
    """Grey of more than 8 bits: 16 bits by their range, others by the first of 1, 255, 65535 that holds all."""
    values = samples(16)
    dark = values % 200  # a dark picture of 16 bits is black, not stretched
    for order, end in ((TIFF_LITTLE, "le"), (TIFF_BIG, "be")):
        for words, each in (("", values), ("-dark", dark)):
            content = tiff(each, 16, 1, order=order)
            yield PictureRow(f"grey16{words}-{end}.tif", content, on_white(to_bytes(each, 16)))
    yield PictureRow("white-is-zero16-le.tif", tiff(values, 16, 0), on_white(to_bytes(65535 - values, 16)))
    for order, end in ((TIFF_LITTLE, "le"), (TIFF_BIG, "be")):
        unit = samples(8) / 255
        content = tiff(unit, 32, 1, order=order, sample_format=3)
        yield PictureRow(f"float-unit-{end}.tif", content, on_white(to_bytes(samples(8), 8)))
        content = tiff(samples(8), 32, 1, order=order, sample_format=3)
        yield PictureRow(f"float-bytes-{end}.tif", content, on_white(to_bytes(samples(8), 8)))
        content = tiff(values, 32, 1, order=order, sample_format=3)
        yield PictureRow(f"float-16-bits-{end}.tif", content, on_white(to_bytes(values, 16)))
        signed = values * 3.0 - 70_000
        expected = on_white(to_bytes(values - values.min(), 16))
        content = tiff(signed, 32, 1, order=order, sample_format=3)
        yield PictureRow(f"float-span-{end}.tif", content, expected, 1)
        content = tiff(values, 32, 1, order=order, sample_format=2)
        yield PictureRow(f"int32-16-bits-{end}.tif", content, on_white(to_bytes(values, 16)))
        content = tiff(samples(8), 32, 1, order=order, sample_format=2)
        yield PictureRow(f"int32-bytes-{end}.tif", content, on_white(samples(8)))
        content = tiff(values - 32768, 16, 1, order=order, sample_format=2)
        yield PictureRow(f"int16-{end}.tif", content, on_white(to_bytes(values, 16)), 1)
    content = tiff(values * 60_000, 32, 1)  # up to 3,932,100,000: above 2^31
    yield PictureRow("uint32.tif", content, on_white(to_bytes(values, 16)))
    content = tiff(samples(12), 12, 1)
    yield PictureRow("grey12.tif", content, on_white(to_bytes(samples(12), 12)))
    content = tiff(1 - unit, 32, 0, sample_format=3)
    yield PictureRow("float-white-is-zero-le.tif", content, on_white(to_bytes(samples(8), 8)))


def bmp_rows() -> Iterator[PictureRow]:
    """Palettes, 16 bits by masks, 24 and 32 bits, from the bottom and from the top."""
    for top_down in (False, True):
        kind = "-top" * top_down
        for bits in (1, 4, 8):
            values = samples(bits)
            palette = np.random.default_rng(bits).integers(0, 256, (1 << bits, 3), np.uint8)
            table = np.pad(palette[:, ::-1], ((0, 0), (0, 1))).tobytes()
            content = bmp(pack_rows(values, bits), SIDE, bits, palette=table, top_down=top_down)
            yield PictureRow(f"palette{bits}{kind}.bmp", content, on_white(palette[values[..., 0]]))
        rgb = colours()
        rows = pack_rows(rgb[..., ::-1], 8)
        yield PictureRow(f"rgb{kind}.bmp", bmp(rows, SIDE, 24, top_down=top_down), on_white(rgb))
        rows = pack_rows(np.pad(rgb[..., ::-1], ((0, 0), (0, 0), (0, 1)), constant_values=7), 8)
        yield PictureRow(f"rgbx{kind}.bmp", bmp(rows, SIDE, 32, top_down=top_down), on_white(rgb))
        values = samples(8, 4)
        rows = pack_rows(values[..., [2, 1, 0, 3]], 8)
        content = bmp(rows, SIDE, 32, masks=(0xFF0000, 0xFF00, 0xFF, 0xFF000000), top_down=top_down)
        yield PictureRow(f"rgba{kind}.bmp", content, on_white(values[..., :3], values[..., 3]), 1)
        for green in (5, 6):  # round(v * 255 / 31) and, for 6 bits, round(v * 255 / 63)
            values = samples(5, 3)
            values[..., 1:2] = samples(green)
            words = values[..., 0] << (5 + green) | values[..., 1] << 5 | values[..., 2]
            rows = [row.astype("<u2").tobytes() for row in words]
            masks = () if green == 5 else (0xF800, 0x7E0, 0x1F)
            content = bmp(rows, SIDE, 16, masks=masks, top_down=top_down)
            expected = np.stack([to_bytes(values[..., c], green if c == 1 else 5) for c in range(3)], -1)
            yield PictureRow(f"rgb16-{green}{kind}.bmp", content, on_white(expected), 1)


def gif_and_ico_rows() -> Iterator[PictureRow]:
    """Palettes with a transparent entry, greys, a first frame smaller than its screen; icons of both kinds."""
    indices = samples(8)[..., 0]
    palette = np.random.default_rng(3).integers(0, 256, (256, 3), np.uint8)
    greys = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
    for words, entries in (("palette", palette), ("grey", greys)):
        yield PictureRow(f"{words}.gif", gif(indices, entries), on_white(entries[indices]))
        yield PictureRow(f"{words}-moving.gif", gif(indices, entries, frames=3), on_white(entries[indices]))
        expected = on_white(entries[indices], 255 * (indices != 77))
        yield PictureRow(f"{words}-transparent.gif", gif(indices, entries, transparent=77), expected)
        for transparent in (None, 77):
            frame = indices[:10, :12]
            expected = np.full((20, SIDE, 3), 255, np.uint8)
            expected[5:15, 7:19] = entries[frame]
            expected[5:15, 7:19][frame == transparent] = 255
            content = gif(
                frame, entries, transparent=transparent, screen=(SIDE, 20), place=(7, 5), background=9
            )
            yield PictureRow(f"{words}-part-{transparent}.gif", content, on_white(expected))
    values = samples(8, 4)
    expected = on_white(values[..., :3], values[..., 3])
    yield PictureRow("png.ico", ico(png(values, 8, 6), SIDE, 20, 32), expected, 1)
    mask = samples(1)
    mask_rows = pack_rows(mask, 1)
    rows = pack_rows(values[..., [2, 1, 0, 3]], 8)
    yield PictureRow("rgba.ico", ico(icon_bitmap(rows, mask_rows, SIDE, 32), SIDE, 20, 32), expected, 1)
    rows = pack_rows(values[..., 2::-1], 8)
    expected = on_white(values[..., :3], 255 * (1 - mask))
    yield PictureRow("rgb.ico", ico(icon_bitmap(rows, mask_rows, SIDE, 24), SIDE, 20, 24), expected)


def netpbm_rows() -> Iterator[PictureRow]:
    """P1 to P6: round(v * 255 / largest value); in bitmaps 1 is black. Pf: floating point."""

    def file(kind: int, values: np.ndarray, largest: int) -> bytes:
        header = f"P{kind}\n# a comment\n{SIDE} 20\n" + ("" if kind in (1, 4) else f"{largest}\n")
        if kind <= 3:
            return (header + "\n".join(" ".join(map(str, row)) for row in values.reshape(20, -1))).encode()
        bits = 1 if kind == 4 else 16 if largest > 255 else 8
        return header.encode() + b"".join(pack_rows(values, bits))

    bitmap = samples(1)
    for kind in (1, 4):
        yield PictureRow(f"p{kind}.pbm", file(kind, bitmap, 1), on_white(255 - 255 * bitmap))
    for largest in (1, 15, 100, 255, 1000, 4095, 65535):
        for kind, channels, suffix in ((2, 1, "pgm"), (5, 1, "pgm"), (3, 3, "ppm"), (6, 3, "ppm")):
            values = samples(16, channels) % (largest + 1)
            expected = on_white(np.floor(values * 255 / largest + 0.5))
            tolerance = 1 if largest in (1000, 4095, 65535, 100) else 0
            yield PictureRow(f"p{kind}-{largest}.{suffix}", file(kind, values, largest), expected, tolerance)
    dark = samples(16) % 200  # a dark picture of 16 bits is black, not stretched
    for kind in (2, 5):
        yield PictureRow(f"p{kind}-dark.pgm", file(kind, dark, 65535), on_white(to_bytes(dark, 16)))
    unit = (samples(8) / 255).astype("<f4")[::-1]
    content = b"Pf\n%d 20\n-1.0\n" % SIDE + unit.tobytes()
    yield PictureRow("float.pfm", content, on_white(samples(8)))


def jpeg_and_webp_rows() -> Iterator[PictureRow]:
    """Flat blocks of 8 x 8 pixels, which a JPEG of the best quality holds within a few levels."""
    rng = np.random.default_rng(8)
    blocks = rng.integers(0, 256, (3, 4, 4), np.uint8).repeat(8, 0).repeat(8, 1)
    rgb, grey = blocks[..., :3], blocks[..., 0]
    best = {"quality": 100, "subsampling": 0}
    for words, options in (("", {}), ("-progressive", {"progressive": True})):
        content = pillow_file(rgb, "JPEG", **best, **options)
        yield PictureRow(f"rgb{words}.jpg", content, on_white(rgb), 4)
        yield PictureRow(
            f"grey{words}.jpg", pillow_file(grey, "JPEG", quality=100), on_white(grey[..., None]), 2
        )
    file = io.BytesIO()
    Image.frombytes("CMYK", (SIDE, 24), np.ascontiguousarray(blocks).tobytes()).save(file, "JPEG", **best)
    inks = blocks / 255.0
    expected = on_white(255 * (1 - inks[..., :3]) * (1 - inks[..., 3:]))
    content = file.getvalue()
    yield PictureRow("cmyk-adobe.jpg", content, expected, 4)  # Adobe's are stored inverted
    marker = content.index(b"\xff\xee\0\x0eAdobe")
    expected = on_white(255 * inks[..., :3] * inks[..., 3:])
    yield PictureRow("cmyk.jpg", content[:marker] + content[marker + 16 :], expected, 4)
    yield PictureRow("rgb.webp", pillow_file(rgb, "WEBP", lossless=True), on_white(rgb))
    alpha = blocks[..., 3]
    content = pillow_file(np.ascontiguousarray(blocks), "WEBP", lossless=True, exact=True)
    yield PictureRow("rgba.webp", content, on_white(rgb, alpha), 1)
    yield PictureRow(
        "lossy.webp",
        pillow_file(rgb * 0 + rgb[:1, :1], "WEBP", quality=100),
        on_white(rgb * 0 + rgb[:1, :1]),
        4,
    )
    file = io.BytesIO()
    frames = [Image.fromarray(each) for each in (rgb, rgb * 0, 255 - rgb)]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    yield PictureRow("moving.webp", file.getvalue(), on_white(rgb))
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    yield PictureRow("moving.png", file.getvalue(), on_white(rgb))


def orientation_rows() -> Iterator[PictureRow]:
    """Every orientation in every format that has one, with every way of being transparent or deep."""
    rgb, deep = colours(), samples(16)
    alpha = samples(8, 4)
    palette = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)
    indices = samples(8)
    sources = {
        "rgb": (rgb.astype(int), 8, 2, on_white(rgb), {}, {}),
        "rgba": (alpha, 8, 6, on_white(alpha[..., :3], alpha[..., 3]), {}, {"extra": 2}),
        "grey16": (deep, 16, 0, on_white(to_bytes(deep, 16)), {}, {}),
        "palette": (
            indices,
            8,
            3,
            on_white(palette[indices[..., 0]]),
            {"palette": palette.tobytes()},
            {"colour_map": palette.astype(int).T * 257},
        ),
    }
    photometric = {2: 2, 6: 2, 0: 1, 3: 3}
    for orientation in range(1, 9):
        block = exif(orientation)
        for words, (values, bits, colour_type, expected, png_options, tiff_options) in sources.items():
            turned = stored(values, orientation)
            name = f"{words}-o{orientation}"
            content = png(turned, bits, colour_type, before=png_chunk(b"eXIf", block), **png_options)
            yield PictureRow(f"{name}.png", content, expected, words == "rgba")
            for order, end in ((TIFF_LITTLE, "le"), (TIFF_BIG, "be")):
                content = tiff(
                    turned,
                    bits,
                    photometric[colour_type],
                    order=order,
                    orientation=orientation,
                    **tiff_options,
                )
                yield PictureRow(f"{name}-{end}.tif", content, expected, words == "rgba")
        turned = stored(deep, orientation)
        transparent = int(deep[3, 3, 0])
        content = png(
            turned, 16, 0, transparency=struct.pack(">H", transparent), after=png_chunk(b"eXIf", block)
        )
        expected = on_white(to_bytes(deep, 16), 255 * (deep != transparent))
        yield PictureRow(f"grey16-trns-o{orientation}-late.png", content, expected)
        content = tiff(
            stored(rgb.astype(int), orientation),
            8,
            2,
            compressed=True,
            predictor=True,
            orientation=orientation,
        )
        yield PictureRow(f"deflate-o{orientation}.tif", content, on_white(rgb))
        blocks = np.random.default_rng(8).integers(0, 256, (3, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        turned = stored(blocks, orientation)
        content = pillow_file(turned, "JPEG", quality=100, subsampling=0, exif=b"Exif\0\0" + block)
        yield PictureRow(f"rgb-o{orientation}.jpg", content, on_white(blocks), 4)
        content = pillow_file(turned, "WEBP", lossless=True, exif=block)
        yield PictureRow(f"rgb-o{orientation}.webp", content, on_white(blocks))


def refused_rows() -> Iterator[PictureRow]:
    """Pictures whose colours are not known, and damaged ones."""
    lab = tiff(samples(8, 3), 8, 8)
    yield PictureRow("lab.tif", lab, "CIELAB")
    for words, colour in (("", (60_910, 44_174, 24_284)), ("-black", (0, 0, 0))):
        content = png(samples(16, 3), 16, 2, transparency=struct.pack(">3H", *colour))
        yield PictureRow(f"rgb16-trns{words}.png", content, "transparent colour of 16 bits")
    for words, value in (("nan", np.nan), ("infinite", np.inf)):
        values = samples(8) / 255
        values[4, 4] = value
        yield PictureRow(f"float-{words}.tif", tiff(values, 32, 1, sample_format=3), "not finite")
    whole = png(colours().astype(int), 8, 2)
    yield PictureRow("cut.png", whole[:-90], "damaged")
    yield PictureRow("cut.tif", tiff(samples(8), 8, 1)[:500], "damaged")
    yield PictureRow("cut-header.tif", tiff(colours().astype(int), 8, 2)[:100], "damaged|not a picture")
    yield PictureRow("cut.bmp", bmp(pack_rows(colours(), 8), SIDE, 24)[:1500], "damaged")
    yield PictureRow("cut.gif", gif(samples(8)[..., 0], np.zeros((256, 3)))[:1000], "damaged")
    yield PictureRow("cut.ppm", b"P6 32 20 255\n" + bytes(1000), "damaged")
    yield PictureRow(
        "zero-width.png", png(np.zeros((20, 0, 3), int), 8, 2), "damaged|not a picture|no pixels"
    )
    yield PictureRow("zero-height.bmp", bmp([], SIDE, 24), "damaged|not a picture|no pixels")
    yield PictureRow("zero.ppm", b"P6 0 0 255\n", "damaged|not a picture|no pixels")
    yield PictureRow("text.png", b"I am no picture.\n" * 50, "not a picture")
