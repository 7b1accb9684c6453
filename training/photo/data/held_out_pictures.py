"""Writes held-out pictures as people show them, one a file, with what each shows: for scores and for calibration.

Photographs are the files that the shards hold. Drawings lie on a plain ground; of the test vendor each named one is
written. Noise and textures, clutter and drawings of unnamed things say that the right answer is to decline.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from microvlm.atomic import new_file
from microvlm.training.photo.data import canvas
from microvlm.training.photo.data.canvas import SIDE
from microvlm.training.photo.data.composer import Composer
from microvlm.training.photo.data.sources import Sources, Split

DRAWINGS, UNNAMED, STRANGERS = 600, 300, 180
"""Most drawings with a name, drawings without and pictures of nothing of a split."""
_SEEDS: dict[Split, int] = {"train": 0, "calibration": 1, "test": 2}


class _Picture(NamedTuple):
    name: str
    content: bytes | Image.Image
    record: dict[str, Any]


def write_pictures(sources: Sources, split: Split, folder: Path, seed: int) -> int:
    """Write FOLDER/SPLIT.jsonl and its pictures in FOLDER/SPLIT/ -> their number.

    A line has `image`, `source`, and `label` or `declines`: what `microvlm-data images` reads.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    lines = []
    for picture in _pictures(Composer(sources, split), np.random.default_rng([seed, _SEEDS[split]])):
        path = f"{split}/{picture.name}"
        with new_file(folder / path) as temporary:
            if isinstance(picture.content, bytes):
                temporary.write_bytes(picture.content)
            else:
                picture.content.save(temporary, format="PNG")
        lines.append(json.dumps({"image": path, **picture.record}) + "\n")
    with new_file(folder / f"{split}.jsonl") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def _pictures(composer: Composer, rng: np.random.Generator) -> Iterator[_Picture]:
    photos = [photo for photo in composer.labelled + composer.clutter if photo.source != "coco"]
    for number, photo in enumerate(photos):
        shown = {"declines": "clutter"} if photo.label is None else {"label": photo.label.lower()}
        yield _Picture(f"photo{number:05d}.jpg", photo.read(), {**shown, "source": photo.source})
    for name, drawings, most in (("named", composer.named, DRAWINGS), ("unnamed", composer.unnamed, UNNAMED)):
        chosen = rng.permutation(len(drawings))[:most]
        if name == "named" and composer.shows_trained:
            # A model is surer of them than of what it never saw.
            continue
        for number, place in enumerate(chosen):
            drawing = drawings[place]
            picture = Image.new("RGB", (SIDE, SIDE), "white")
            canvas.place(picture, composer.sources.pixels(drawing), 0.92, 0.0, (0.5, 0.5))
            shown = {"declines": "drawing"} if drawing.name is None else {"label": drawing.name.lower()}
            yield _Picture(f"{name}{number:05d}.png", picture, {**shown, "source": drawing.sheet})
    for number in range(STRANGERS):
        kind = canvas.STRANGER_KINDS[number % len(canvas.STRANGER_KINDS)]
        picture = Image.fromarray(canvas.stranger(kind, rng))
        yield _Picture(f"noise{number:05d}.png", picture, {"declines": "noise", "source": kind})
