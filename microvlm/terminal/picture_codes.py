"""A picture as text for a terminal: the codes of kitty, iTerm2 and sixel, and half blocks in 24-bit colour.

Sources: kitty's "Terminal graphics protocol", iTerm2's "Inline Images Protocol", chapter 14 of DEC's "VT330/VT340
Programmer Reference Manual" (sixel). A picture is encoded anew from its pixels: no byte of a stranger's file reaches
the terminal. Knows no terminal and no file.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

_CHUNK = 4096
"""Bytes of base64 in one code of kitty's, at most."""
_SIXEL_COLOURS = 256
_BAND = 6
"""Rows of pixels in a row of sixels."""


def kitty(image: Image.Image, columns: int, rows: int) -> str:
    """The image as PNG, scaled to columns x rows cells, in chunks; the cursor goes to the line below."""
    data = base64.standard_b64encode(_png(image)).decode()
    chunks = [data[at : at + _CHUNK] for at in range(0, len(data), _CHUNK)]
    codes = []
    for number, chunk in enumerate(chunks):
        # a=T: transmit and show; f=100: PNG; q=2: the terminal answers nothing; m=1: more follows.
        keys = f"a=T,f=100,q=2,c={columns},r={rows}," if number == 0 else ""
        codes.append(f"\033_G{keys}m={int(number < len(chunks) - 1)};{chunk}\033\\")
    return "".join(codes) + "\n"


def iterm2(image: Image.Image, columns: int, rows: int) -> str:
    """The image as PNG, in columns x rows cells; the cursor goes to the line below."""
    png = _png(image)
    keys = f"size={len(png)};width={columns};height={rows};preserveAspectRatio=1;inline=1"
    return f"\033]1337;File={keys}:{base64.standard_b64encode(png).decode()}\a\n"


def sixel(image: Image.Image) -> str:
    """The image in its own size with at most 256 colours; the cursor goes to the line below.

    A band of six rows is drawn colour after colour; a character holds six pixels of one column, the topmost in bit 0.
    """
    paletted = image.convert("RGB").quantize(_SIXEL_COLOURS, Image.Quantize.MEDIANCUT)
    palette = np.asarray(paletted.getpalette() or [], np.uint8).reshape(-1, 3)
    pixels = np.asarray(paletted)
    height, width = pixels.shape
    parts = [f'\033Pq"1;1;{width};{height}']
    for number in np.unique(pixels):
        red, green, blue = (round(int(value) * 100 / 255) for value in palette[number])
        parts.append(f"#{number};2;{red};{green};{blue}")
    bits = 1 << np.arange(_BAND)[:, None]
    for top in range(0, height, _BAND):
        band = pixels[top : top + _BAND]
        lines = [
            f"#{number}{_run_lengths(((band == number) * bits[: len(band)]).sum(0))}"
            for number in np.unique(band)
        ]
        parts.append("$".join(lines) + "-")
    return "".join(parts) + "\033\\\n"


def half_blocks(image: Image.Image, columns: int, rows: int) -> str:
    """The image as columns x rows cells, each two pixels: the upper in the colour of a half block, the lower behind."""
    pixels = np.asarray(image.convert("RGB").resize((columns, 2 * rows), Image.Resampling.BOX))
    lines = []
    for top in range(0, 2 * rows, 2):
        cells = [
            "\033[38;2;{};{};{};48;2;{};{};{}m▀".format(*upper, *lower)
            for upper, lower in zip(pixels[top], pixels[top + 1], strict=True)
        ]
        lines.append("".join(cells) + "\033[0m\n")
    return "".join(lines)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return file.getvalue()


def _run_lengths(sixels: np.ndarray) -> str:
    """Characters of a band's sixels, 0 to 63 each; a run of four or more as !COUNT and the character."""
    starts = np.flatnonzero(np.diff(sixels, prepend=-1))
    counts = np.diff(starts, append=len(sixels))
    characters = (chr(63 + int(sixels[start])) for start in starts)
    return "".join(
        f"!{count}{character}" if count > 3 else character * int(count)
        for character, count in zip(characters, counts, strict=True)
    )
