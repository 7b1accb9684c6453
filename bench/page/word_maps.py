"""Maps of where each word of an answer looked, drawn over its picture. Takes numbers of documents; knows no model.

A map says nothing by colour alone: it goes from dark to bright, its strongest place has a frame, its words name that
place, and its numbers can be unfolded.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from microvlm.bench.attention.attention_records import LookedAt, WordMap
from microvlm.commands.attention_reading import LEGEND
from microvlm.commands.heatmap import overlay
from microvlm.escaping import printable
from microvlm.inputs.images import load_scaled, load_square

SIDE = 160
"""Pixels of a map's longer side in the page; a map takes some 5 kB."""
MOST_MAPS = 200
"""Maps in a page. Of a document with more, the pictures that come later have none, and the page says so."""
EXPLANATION = f"{LEGEND} Framed: the word's strongest place."


def word_maps(path: Path, looked: LookedAt, stretch: bool, name: str) -> str:
    """A list of the maps of `looked` over the picture at `path`, and their numbers to unfold."""
    picture = load_scaled(path, SIDE) if stretch else load_square(path, SIDE)
    cells = [len(word.weights) * len(word.weights[0]) for word in looked.maps]
    largest = [max(map(max, word.weights)) for word in looked.maps]
    # As `microvlm caption --attention` draws them: one scale, which never makes a flat map bright.
    scale = max([1 / max(cells), *largest])
    items = "".join(
        f'<li><img src="{_map(picture, word, scale)}" alt="{escape(_sentence(word))}">'
        f"<p><strong>{escape(printable(word.word))}</strong>: {escape(printable(word.note))}</p></li>"
        for word in looked.maps
    )
    numbers = "".join(map(_numbers, looked.maps))
    return (
        f'<p class="looked">Where {escape(printable(name))} looked</p><ul class="maps">{items}</ul>'
        f"<details><summary>In numbers</summary>{numbers}</details>"
    )


def data_url(picture: Image.Image, quality: int) -> str:
    """A picture as a JPEG that stands in the page itself."""
    packed = io.BytesIO()
    picture.save(packed, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}"


def _sentence(word: WordMap) -> str:
    return f"\u201c{printable(word.word)}\u201d looked most at {word.place}"


def _map(picture: Image.Image, word: WordMap, scale: float) -> str:
    weights = np.array(word.weights, np.float32)
    drawn = overlay(picture, weights / scale)
    if weights.any():
        row, column = word.strongest
        height, width = drawn.height / weights.shape[0], drawn.width / weights.shape[1]
        box = (column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1)
        pen = ImageDraw.Draw(drawn)
        # Black in white: one of the two stands out from any picture.
        pen.rectangle(box, outline="white", width=4)
        pen.rectangle(
            tuple(edge + step for edge, step in zip(box, (1, 1, -1, -1), strict=True)),
            outline="black",
            width=2,
        )
    return data_url(drawn, 75)


def _numbers(word: WordMap) -> str:
    """Percent of the word's attention at each place, as a table of the picture's rows and columns."""
    rows = "".join(
        f"<tr>{''.join(f'<td>{100 * value:.1f}</td>' for value in row)}</tr>" for row in word.weights
    )
    caption = f"{escape(_sentence(word))}. Percent of its attention at each place:"
    label = escape(f"attention of {printable(word.word)}")
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{label}"><table><caption>{caption}</caption>'
        f"<tbody>{rows}</tbody></table></div>"
    )
