"""Draws what is known about each word of an answer: maps over the picture, and a table of tokens x prefix embeddings.

Takes numbers from `attention_reading` and `evidence`; knows no model. Needs Pillow only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from microvlm.escaping import printable
from microvlm.inputs.images import ImageSource, load_scaled, load_square
from microvlm.inputs.processor import Processor

PANEL_PX = 224
_TEXT_PX, _MARGIN_PX, _COLUMNS = 28, 8, 6
_CELL_PX, _LABEL_PX, _LINE_PX = 18, 170, 20
WORDS = "Description"
"""The text of a drawn PNG that holds its words."""
MOST_ROWS = 64
"""Tokens of a table; of a longer text the last ones are drawn."""
# From dark to bright, so that the map is readable in grey too: (position, red, green, blue).
_COLOURS = np.array(
    [(0.0, 0, 0, 4), (0.25, 87, 16, 110), (0.5, 188, 55, 84), (0.75, 249, 142, 9), (1.0, 252, 255, 164)]
)
# Below zero, zero, above zero.
_SIGNED = np.array([(0.0, 33, 102, 172), (0.5, 247, 247, 247), (1.0, 178, 24, 43)])


class WordMap(NamedTuple):
    """What one word of an answer has to do with the parts of the picture."""

    word: str
    weights: np.ndarray
    """float32 [grid, grid], 0 or more, in the unit of the whole sheet."""
    note: str = ""
    """Numbers that stand behind the word."""


class Table(NamedTuple):
    """A matrix with a text for each row."""

    title: str
    labels: Sequence[str]
    values: np.ndarray
    """float32 [rows, columns]."""
    columns: str
    """What the columns are."""


def split_words(processor: Processor, tokens: list[int]) -> list[tuple[str, list[int]]]:
    """Group token positions into words: a token whose text starts with white space starts a word.

    An answer that was cut within a character ends with the replacement character, as its text does.
    """
    words: list[tuple[str, list[int]]] = []
    stream, text = processor.stream(), ""
    for index, token in enumerate(tokens):
        piece = stream.feed(token)
        if index == len(tokens) - 1:
            piece += stream.finish()
        if not words or (piece[:1].isspace() and text.strip()):
            words.append(("", []))
            text = ""
        text += piece
        words[-1] = (text.strip(), [*words[-1][1], index])
    return [(word, members) for word, members in words if word]


def draw(
    image: ImageSource,
    maps: list[WordMap],
    caption: str,
    floor: float,
    legend: str,
    table: Table | None = None,
    stretch: bool = False,
) -> Image.Image:
    """Draw the image, then one panel per word, six in a row; the legend; and the table under them.

    All maps have one scale: from 0 to the largest weight of any, but at least to `floor`, so that maps which say little
    look flat. `stretch`: the model sees the picture stretched to a square, so a map covers all of it; both are drawn in
    the picture's own shape.
    """
    picture = load_scaled(image, PANEL_PX) if stretch else load_square(image, PANEL_PX)
    scale = max([floor, *(float(m.weights.max()) for m in maps)])
    panels = [(picture, caption)] + [(overlay(picture, m.weights / scale), f"{m.word}{m.note}") for m in maps]
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width, height = PANEL_PX + _MARGIN_PX, PANEL_PX + _TEXT_PX + _MARGIN_PX
    drawn_table = None if table is None else draw_table(table)
    sheet_width = max(columns * width + _MARGIN_PX, 0 if drawn_table is None else drawn_table.width)
    font = ImageFont.load_default(size=13)
    lines = _wrap(legend, font, sheet_width - 2 * _MARGIN_PX)
    top = rows * height + _MARGIN_PX
    below = top + _LINE_PX * len(lines) + _MARGIN_PX
    sheet = Image.new("RGB", (sheet_width, below + (drawn_table.height if drawn_table else 0)), "white")
    pen, large = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for index, (panel, text) in enumerate(panels):
        x, y = _MARGIN_PX + index % columns * width, _MARGIN_PX + index // columns * height
        sheet.paste(panel, (x + (PANEL_PX - panel.width) // 2, y + (PANEL_PX - panel.height) // 2))
        pen.text((x, y + PANEL_PX + 4), _fit(text, large, PANEL_PX), font=large, fill="black")
    for number, line in enumerate(lines):
        pen.text((_MARGIN_PX, top + _LINE_PX * number), line, font=font, fill=(90, 90, 90))
    if drawn_table is not None:
        sheet.paste(drawn_table, (0, below))
    return sheet


def words_of(maps: list[WordMap], caption: str) -> PngInfo:
    """What `draw` writes under the panels, a line each, for programs and people who cannot see them."""
    info = PngInfo()
    info.add_text(WORDS, "\n".join(map(printable, [caption, *(f"{m.word}{m.note}" for m in maps)])))
    return info


def draw_table(table: Table, cell_width: int = _CELL_PX) -> Image.Image:
    """Draw a matrix: a row of cells for each label, and a scale. Negative numbers get colours of their own."""
    cell = _CELL_PX
    values = np.asarray(table.values, np.float32)[-MOST_ROWS:]
    labels = list(table.labels)[-MOST_ROWS:]
    font = ImageFont.load_default(size=13)
    largest = float(np.abs(values).max(initial=0.0))
    signed = float(values.min(initial=0.0)) < 0
    shares = values / (largest or 1.0)
    pixels = _colours(shares / 2 + 0.5, _SIGNED) if signed else _colours(shares, _COLOURS)
    rows, columns = values.shape
    body = Image.fromarray(pixels).resize((columns * cell_width, rows * cell), Image.Resampling.NEAREST)
    words = f"{table.columns}; colours: {-largest if signed else 0:.2g} to {largest:.2g}"
    lines = _wrap(words, font, max(body.width, 2 * PANEL_PX - _LABEL_PX))
    width = _LABEL_PX + max(body.width, *(int(font.getlength(text)) + 1 for text in (table.title, *lines)))
    height = 2 * _LINE_PX + body.height + _LINE_PX * len(lines)
    sheet = Image.new("RGB", (width + 2 * _MARGIN_PX, height + _MARGIN_PX), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN_PX, 2), table.title, font=font, fill="black")
    left, top = _MARGIN_PX + _LABEL_PX, 2 * _LINE_PX - 12
    sheet.paste(body, (left, top))
    for row, label in enumerate(labels):
        text = _fit(" ".join(label.split()) or "·", font, _LABEL_PX - 8)
        pen.text((left - 6, top + row * cell + cell // 2), text, font=font, fill="black", anchor="rm")
    for number, line in enumerate(lines):
        pen.text((left, top + body.height + 4 + _LINE_PX * number), line, font=font, fill=(90, 90, 90))
    return sheet


def plain_map(word_map: WordMap) -> dict[str, Any]:
    """A map as JSON holds it: `word`, `note`, and `weights` with five decimals."""
    rows = [[round(float(value), 5) for value in row] for row in word_map.weights]
    return {"word": word_map.word, "note": word_map.note.removeprefix(": "), "weights": rows}


def overlay(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture under a map, float32 [rows, columns] in 0..1, that is stretched over all of it."""
    grey = Image.fromarray(heat.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.blend(picture.convert("RGB"), Image.fromarray(_colours(np.asarray(grey), _COLOURS)), 0.6)


def _colours(shares: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Shares of a colour scale, 0 to 1 -> uint8 [..., 3]."""
    return np.stack([np.interp(shares, scale[:, 0], scale[:, c]) for c in (1, 2, 3)], -1).astype(np.uint8)


def _fit(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """Cut text to a width in pixels."""
    label = text
    while len(text) > 1 and font.getlength(label) > width:
        text = text[:-1]
        label = text.rstrip() + "…"
    return label


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break text into lines of a width in pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
