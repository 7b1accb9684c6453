"""A contact sheet: some pictures of a data folder with what is said about them, since people look first."""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from microvlm.inputs.images import load_square
from microvlm.training.data.caption_data import CaptionData, CaptionSample
from microvlm.training.data.mixture import permutation

COLUMNS, ROWS = 6, 4
SIDE, TEXT_HEIGHT, GAP = 160, 44, 6
_LINE, _LINES = 26, 3
"""Characters of a line under a picture, and lines."""


def write_preview(data: CaptionData, path: Path) -> None:
    """Write a JPEG of up to 24 training samples, drawn by a fixed seed."""
    count = data.count("train")
    chosen = (
        [int(n) for n in permutation(count, 0)[: COLUMNS * ROWS]] if count < 10**6 else range(COLUMNS * ROWS)
    )
    rows = -(-len(chosen) // COLUMNS)
    size = COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + TEXT_HEIGHT + GAP) + GAP
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, number in enumerate(chosen):
        sample = data.sample("train", number)
        left = GAP + place % COLUMNS * (SIDE + GAP)
        top = GAP + place // COLUMNS * (SIDE + TEXT_HEIGHT + GAP)
        sheet.paste(_tile(sample), (left, top))
        draw.text((left, top + SIDE + 2), _caption(sample), "black", font)
    sheet.save(path, "JPEG", quality=85)


def _tile(sample: CaptionSample) -> Image.Image:
    """The sample's picture, or its first four in quarters."""
    if len(sample.images) == 1:
        return load_square(sample.images[0], SIDE)
    tile = Image.new("RGB", (SIDE, SIDE), "white")
    for number, content in enumerate(sample.images[:4]):
        tile.paste(load_square(content, SIDE // 2), (number % 2 * SIDE // 2, number // 2 * SIDE // 2))
    return tile


def _caption(sample: CaptionSample) -> str:
    turn = sample.turns[0]
    text = turn.answer if turn.question is None else f"{turn.question} {turn.answer}"
    lines = textwrap.wrap(text, _LINE, max_lines=_LINES, placeholder="…")
    return "\n".join(lines)
