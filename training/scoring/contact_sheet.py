"""A contact sheet: held-out pictures with the model's caption and a person's, good and bad alike."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from microvlm.atomic import new_file, os_errors_about
from microvlm.errors import UserError
from microvlm.inputs.images import load_square
from microvlm.training.scoring.held_out import Picture

PICTURES, COLUMNS = 20, 5
SHEET = "captions.png"
"""The sheet's name in a folder."""
_SIDE, _GAP, _FONT, _LINE_HEIGHT = 224, 10, 13, 17
_LINE, _LINES = 33, 3
"""Characters of a line, and lines of one caption."""
_COLOURS = ("#0b5394", "#7f4a00", "#404040")
"""Of the models' captions and of the person's."""


def chosen_pictures(pictures: Sequence[Picture]) -> list[int]:
    """Numbers of up to PICTURES pictures, by the hash of their keys: no score decides what is shown."""
    hashes = [hashlib.sha256(picture.key.encode()).hexdigest() for picture in pictures]
    return sorted(range(len(pictures)), key=hashes.__getitem__)[:PICTURES]


def sheet_path(given: Path) -> Path:
    """The file that `--pictures` means: a .png, or SHEET in a folder, which need not exist yet.

    Raises UserError for another kind of file, and where the folder above is missing.
    """
    is_file = bool(given.suffix) and not given.is_dir()
    if is_file and given.suffix.lower() != ".png":
        raise UserError(f"--pictures is {given}: give a name that ends with .png, or a folder.")
    if not given.absolute().parent.is_dir():
        raise UserError(f"{given} cannot be written: its folder does not exist; make it first.")
    return given if is_file else given / SHEET


def write_sheet(
    pictures: Sequence[Picture], captions: Sequence[Sequence[tuple[str, str]]], path: Path
) -> None:
    """Write a PNG, and make its folder. `captions`: of each picture, (who says it, what) from top to bottom."""
    texts = [[_wrap(who, text) for who, text in said] for said in captions]
    columns = min(COLUMNS, len(pictures))
    text_height = _LINE_HEIGHT * max(sum(map(len, said)) for said in texts)
    width, height = _SIDE + _GAP, _SIDE + text_height + 2 * _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, -(-len(pictures) // columns) * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    for place, (picture, said) in enumerate(zip(pictures, texts, strict=True)):
        left, top = _GAP + place % columns * width, _GAP + place // columns * height
        sheet.paste(load_square(picture.image, _SIDE), (left, top))
        at = top + _SIDE + 3
        for number, lines in enumerate(said):
            colour = _COLOURS[-1] if number == len(said) - 1 else _COLOURS[number % 2]
            draw.text((left, at), "\n".join(lines), colour, font)
            at += _LINE_HEIGHT * len(lines)
    with os_errors_about(path.parent):
        path.parent.mkdir(exist_ok=True)
    with new_file(path) as temporary:
        sheet.save(temporary, "PNG", optimize=True)


def _wrap(who: str, text: str) -> list[str]:
    return textwrap.wrap(f"{who}: {text}", _LINE, max_lines=_LINES, placeholder=" …")
