"""Facts asked for with another vendor's drawing of their object, and the second set of drawings that this takes.

The set has the format of the evaluation set and the same objects. `python -m microvlm.bench.memory_vendor FOLDER OUT`
makes one of what `microvlm-data emoji` rendered; the package carries OpenMoji's, which nothing was trained on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from microvlm.bench.evalset_reader import EvalSet, load_evalset
from microvlm.bench.memory_scores import Encoded, nearest_name, right_answers
from microvlm.bench.memory_subject import Query, Subject
from microvlm.bench.stats import wilson
from microvlm.errors import UserError

VENDOR = "openmoji"
COLOURS = 48
"""Of a stored drawing: line art has few, and its file becomes a third as long."""
PROVENANCE = """\
# Another vendor's drawings of the evaluation set's objects

Drawings: OpenMoji (https://openmoji.org), HfG Schwäbisch Gmünd and contributors, taken from the npm
package @iconify-json/openmoji 1.2.29.
Licence: Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0),
https://creativecommons.org/licenses/by-sa/4.0/

Changes made: the vector drawings were rasterised and scaled onto a white ground of 96 x 96 pixels
and reduced to 48 colours. Captions are the English labels of emojibase-data (MIT), in lower case ASCII.

Used to test only: no drawing of this set was ever trained on, and no checkpoint is made from it. The files
are under the licence above, not under the project's own. Written by `python -m microvlm.bench.memory_vendor`.
"""


def load_other_vendor(path: str | Path | None, evalset: EvalSet) -> EvalSet:
    """The set in the folder `path`, or the package's. Raises UserError when an object of `evalset` is not in it."""
    other = load_evalset(path or Path(__file__).with_name("evalset_openmoji"))
    missing = {image.hexcode for image in evalset.images} - {image.hexcode for image in other.images}
    if missing:
        raise UserError(
            f"{other.folder} has no drawing of {len(missing)} objects of the evaluation set, such as "
            f"{min(missing)}: give a set of the same objects."
        )
    return other


def other_vendor(
    subject: Subject, encoded: Encoded, count: int, evalset: EvalSet, other: EvalSet
) -> dict[str, Any]:
    """`count` facts written as ever and asked for with the plain drawing of `other`: the share that is answered right.

    `nearest_neighbour` is what the codes give alone: the name of the written fact whose question has the nearest code.
    """
    files = {image.hexcode: image.file for image in other.images}
    asked: list[Query] = [
        (fact.question, other.pixels(files[evalset.images[fact.object].hexcode]))
        for fact in encoded.facts[:count]
    ]
    names = encoded.names[:count]
    memory = subject.remember(encoded.keys[:count], encoded.values[:count])
    right = right_answers(subject.answers(asked, memory.states), names)
    codes, _ = subject.encode(asked)
    return {
        "facts": count,
        "recall": right / count,
        "ci95": wilson(right, count),
        "nearest_neighbour": nearest_name(codes, encoded.codes[:count], names),
        "drawings": other.folder.name,
    }


def build(rendered: Path, out: Path, vendor: str = VENDOR) -> int:
    """Write the drawings of `vendor` of the evaluation set's objects to `out`; their number. Raises UserError.

    rendered: what `microvlm-data emoji` wrote: emoji.json, and rgba96/VENDOR.npy, uint8 [N, 96, 96, 4], straight alpha.
    """
    try:
        rows = {
            row["hexcode"]: index for index, row in enumerate(_read_json(rendered / "emoji.json")["emoji"])
        }
        drawings = np.load(rendered / "rgba96" / f"{vendor}.npy", mmap_mode="r")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{rendered} holds no drawings of {vendor} ({error}): run microvlm-data emoji."
        ) from None
    (out / "images").mkdir(parents=True)
    records = []
    for image in load_evalset().images:
        rgba = np.asarray(drawings[rows[image.hexcode]], np.float32) / 255
        pixels = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
        picture = Image.fromarray((pixels * 255).round().astype(np.uint8))
        picture.quantize(COLOURS, dither=Image.Dither.NONE).save(out / image.file, "PNG", optimize=True)
        records.append(json.dumps(vars(image)))
    lines = ",\n".join(records)
    (out / "evalset.json").write_text(
        f'{{\n"images": [\n{lines}\n],\n"scenes": [],\n"episodes": []\n}}\n', encoding="utf-8"
    )
    (out / "README.md").write_text(PROVENANCE, encoding="utf-8")
    return len(records)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    print(f"{build(Path(sys.argv[1]), Path(sys.argv[2]))} drawings in {sys.argv[2]}")
