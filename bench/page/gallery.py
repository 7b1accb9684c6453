"""Example pictures with the answers of each backend side by side, from documents of `equivalence`. Knows no backend.

A document names pictures; only those of the package's own sets are shown, never a file that a document points to.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from microvlm.bench.equivalence.equivalence_records import EquivalenceReport
from microvlm.bench.evalset_reader import load_evalset
from microvlm.bench.photograph_reader import read_photographs
from microvlm.escaping import printable

SIDE = 240
"""Pixels of a picture's longer side in the page."""


class Answered(NamedTuple):
    """One picture under one prompt."""

    prompt: str
    right: str
    answers: dict[str, str]
    """By model and backend."""


def gallery(reports: Iterable[EquivalenceReport]) -> str:
    """A list of pictures with their answers; empty where no document has examples."""
    pictures: dict[str, Answered] = {}
    for report in reports:
        sides = [f"{side.model} on {side.backend}" for side in (report.reference, report.candidate)]
        for example in report.examples:
            shown = pictures.setdefault(example.picture, Answered(example.prompt, example.right, {}))
            if (shown.prompt, shown.right) == (example.prompt, example.right):
                shown.answers.update(zip(sides, (example.reference, example.candidate), strict=True))
    paths = _known_pictures()
    items = [_item(paths[name], answered) for name, answered in pictures.items() if name in paths]
    return f'<ul class="gallery">{"".join(items)}</ul>' if items else ""


def _item(path: Path, answered: Answered) -> str:
    answers = "".join(
        f"<dt>{escape(printable(side))}</dt><dd>{escape(printable(text)) or '(nothing)'}</dd>"
        for side, text in answered.answers.items()
    )
    right = escape(printable(answered.right))
    return (
        f'<li><img src="{_picture(path)}" alt="{right}"><p>{escape(printable(answered.prompt))}</p>'
        f"<dl><dt>right</dt><dd>{right}</dd>{answers}</dl></li>"
    )


def _known_pictures() -> dict[str, Path]:
    evalset = load_evalset()
    known = {image.file: evalset.path(image.file) for image in evalset.images}
    return known | {photograph.file: photograph.path for photograph in read_photographs()}


def _picture(path: Path) -> str:
    """A small JPEG as a data URL, on white where the picture is transparent."""
    with Image.open(path) as image:
        image.thumbnail((SIDE, SIDE))
        whole = image.convert("RGBA")
    flat = Image.new("RGB", whole.size, "white")
    flat.paste(whole, mask=whole.getchannel("A"))
    packed = io.BytesIO()
    flat.save(packed, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}"
