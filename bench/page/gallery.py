"""Example pictures with the answers of each backend side by side, and where each word of an answer looked.

From documents of `equivalence` and `attention`. Knows no backend. A document names pictures; only those of the
package's own sets are shown, never a file that a document points to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image

from microvlm.bench.attention.attention_records import AttentionReport, LookedAt
from microvlm.bench.equivalence.equivalence_records import EquivalenceReport
from microvlm.bench.evalset_reader import load_evalset
from microvlm.bench.page.word_maps import EXPLANATION, MOST_MAPS, data_url, word_maps
from microvlm.bench.photograph_reader import read_photographs
from microvlm.escaping import printable

SIDE = 240
"""Pixels of a picture's longer side in the page."""
MOST_PICTURES = 200
"""Pictures in a page, so that documents of any length give a page of a few megabytes."""


@dataclass
class _Shown:
    """One picture under one prompt."""

    prompt: str
    right: str
    answers: dict[str, str] = field(default_factory=dict)
    """By model and backend."""
    looked: dict[str, tuple[LookedAt, bool]] = field(default_factory=dict)
    """Maps, and whether they cover the picture in its own shape."""


def gallery(reports: Iterable[EquivalenceReport], attention: Iterable[AttentionReport] = ()) -> str:
    """A list of pictures with their answers and maps; empty where no document has examples."""
    pictures: dict[tuple[str, str, str], _Shown] = {}

    def shown(picture: str, prompt: str, right: str) -> _Shown:
        return pictures.setdefault((picture, prompt, right), _Shown(prompt, right))

    for report in reports:
        sides = [f"{side.model} on {side.backend}" for side in (report.reference, report.candidate)]
        for example in report.examples:
            answers = zip(sides, (example.reference, example.candidate), strict=True)
            shown(example.picture, example.prompt, example.right).answers.update(answers)
    for each in attention:
        name = f"{each.model.model} on {each.backend}"
        for looked in each.examples:
            one = shown(looked.picture, each.prompt, looked.right)
            one.answers[name] = looked.answer
            if looked.maps:
                one.looked[name] = looked, each.stretch
    paths = _known_pictures()
    known = [(paths[name], one) for (name, _, _), one in pictures.items() if name in paths]
    if not known:
        return ""
    items, drawn, left_out = [], 0, max(0, len(known) - MOST_PICTURES)
    for path, one in known[:MOST_PICTURES]:
        drawn += sum(len(looked.maps) for looked, _ in one.looked.values())
        if drawn > MOST_MAPS:
            left_out, one.looked = left_out + bool(one.looked), {}
        items.append(_item(path, one))
    parts = [f"<p>{escape(EXPLANATION)}</p>"] if drawn else []
    parts.append(f'<ul class="gallery">{"".join(items)}</ul>')
    if left_out:
        parts.append(
            f"<p>{left_out} pictures or their maps are left out: a page holds {MOST_PICTURES} and {MOST_MAPS}.</p>"
        )
    return "".join(parts)


def _item(path: Path, shown: _Shown) -> str:
    answers = "".join(
        f"<dt>{escape(printable(side))}</dt><dd>{escape(printable(text)) or '(nothing)'}</dd>"
        for side, text in shown.answers.items()
    )
    right = escape(printable(shown.right))
    maps = "".join(word_maps(path, looked, stretch, name) for name, (looked, stretch) in shown.looked.items())
    return (
        f'<li><img src="{_picture(path)}" alt="{right}"><p>{escape(printable(shown.prompt))}</p>'
        f"<dl><dt>right</dt><dd>{right}</dd>{answers}</dl>{maps}</li>"
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
    return data_url(flat, 80)
