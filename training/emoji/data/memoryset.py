"""Builds the objects of `microvlm-bench memory`: held-out emoji as drawn by the test vendor and by another one.

They are chosen by hash before any training on facts, which uses neither these emoji nor the test vendor's drawings. The
reader is `microvlm.bench.memory.memoryset_reader`, which needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from microvlm.atomic_folder import new_folder
from microvlm.training.emoji.data.drawing_sources import TEST_VENDOR, DataError
from microvlm.training.emoji.data.emoji import EmojiData
from microvlm.training.emoji.data.evalset import save_images
from microvlm.training.emoji.data.views import plain_emoji

OBJECTS = 192
"""Three times the slots of `nano`."""
OTHER_VENDOR = "noto"

PROVENANCE = """\
# Objects to remember

`images/`: drawings of EmojiOne 2.x, continued as EmojiTwo (https://github.com/EmojiTwo/emojitwo),
copyright Ranks.com Inc. and the EmojiTwo contributors, taken from the npm package
@iconify-json/emojione {version}.
Licence: Creative Commons Attribution 4.0 International (CC BY 4.0),
https://creativecommons.org/licenses/by/4.0/

`others/`: the same emoji by Noto Emoji (https://github.com/googlefonts/noto-emoji), copyright Google
Inc., taken from the npm package @iconify-json/noto {other_version}.
Licence: Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0

Changes made: the vector drawings were rasterised and scaled onto a white ground of 96 x 96 pixels.
Captions are the English labels of emojibase-data (MIT), in lower case ASCII.

No emoji of this set has a caption or a fact in training, and no drawing in `images/` is used in it.
Drawings of these emoji by other vendors, those in `others/` among them, were distilled without names.
The files are under the licences above, not under the project's own. Written by
`microvlm-data memoryset`.
"""


def choose_memory_objects(emoji: EmojiData, count: int = OBJECTS) -> np.ndarray:
    """Rows of the `count` held-out emoji, drawn by both vendors, with the smallest sha256 of their hexcode."""
    candidates = emoji.held_out & emoji.present(TEST_VENDOR) & emoji.present(OTHER_VENDOR)
    hashes = {
        row: hashlib.sha256(emoji.hexcodes[row].encode()).hexdigest() for row in np.flatnonzero(candidates)
    }
    return np.array(sorted(hashes, key=hashes.__getitem__)[:count], np.int64)


def build_memoryset(emoji: EmojiData, out: Path, version: str, other_version: str) -> dict:
    """Write the set to `out`, which must not exist; returns counts and bytes."""
    if out.exists():
        raise DataError(f"{out} exists: choose another --output.")
    rows = choose_memory_objects(emoji)
    records = [
        {
            "file": f"images/{emoji.hexcodes[row].lower()}.png",
            "other": f"others/{emoji.hexcodes[row].lower()}.png",
            "caption": emoji.captions[row],
            "hexcode": emoji.hexcodes[row],
        }
        for row in rows
    ]
    with new_folder(out) as temporary:
        for vendor, part in ((TEST_VENDOR, "file"), (OTHER_VENDOR, "other")):
            drawings = torch.from_numpy(np.array(emoji.images(vendor)[rows]))
            save_images(temporary, [record[part] for record in records], plain_emoji(drawings))
        text = PROVENANCE.format(version=version, other_version=other_version)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        body = ",\n".join(json.dumps(record) for record in records)
        (temporary / "memoryset.json").write_text(f'{{"objects": [\n{body}\n]}}\n', encoding="utf-8")
    total = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {"output": str(out), "objects": len(records), "bytes": total}
