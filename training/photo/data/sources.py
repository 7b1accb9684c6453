"""What pictures are composed of: photographs with labels, named drawings, and drawings and photographs of other things.

Splits are by a hash of a source's key, or by its place in its series, so that no picture of a test is trained on:
`train`, `calibration` (thresholds and confidences) and `test`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from microvlm.errors import UserError
from microvlm.training.emoji.data.drawing_sources import STRESS_VENDOR, TRAIN_VENDORS
from microvlm.training.emoji.data.drawings import load_drawings
from microvlm.training.emoji.data.emoji import EmojiData, load_emoji

Split = Literal["train", "calibration", "test"]
HELD_OUT: tuple[Split, ...] = ("calibration", "test")
DRAWING_SIZES = (160, 96)
"""Sides of the rendered emoji, pixels; the first that a folder has of a vendor is taken."""
ONE_COLOUR = "fluent-emoji-high-contrast"
"""The vendor whose drawings are black, and get any colour."""
CALIBRATION_VENDOR = STRESS_VENDOR
"""Drawings in a style that is not trained on, which confidences are fitted on."""
TEST_VENDOR = "emojione"
_HELD_OUT_VENDORS: dict[str, Split] = {CALIBRATION_VENDOR: "calibration", TEST_VENDOR: "test"}
EVALUATION_ONLY = ("imagenet-sample", "coco")
"""Sources whose pictures are never trained on."""


@dataclass(frozen=True)
class Photo:
    """A photograph in a tar shard."""

    shard: Path
    offset: int
    size: int
    key: str
    label: str | None
    """None for clutter: a photograph of nothing in particular."""
    source: str
    split: Split

    def read(self) -> bytes:
        """The JPEG file."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Drawing:
    """A drawing of the emoji folder, or one of the many drawings without captions."""

    sheet: str
    """Vendor, or `drawings`."""
    row: int
    name: str | None
    """None for a thing that the model is not told the name of."""
    split: Split


class Sources:
    """Everything that pictures are composed of."""

    def __init__(self, photos: Sequence[Photo], emoji: EmojiData | None, drawings: Sequence[Drawing]):
        self.photos = list(photos)
        self.drawings = list(drawings)
        self._emoji = emoji
        self._sheets: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, shards: Sequence[Path], emoji_folder: Path | None) -> Sources:
        """Open tar shards of photographs and a folder of `microvlm-data emoji`. Raises UserError."""
        photos = [photo for shard in shards for photo in read_shard(shard)]
        emoji = None if emoji_folder is None else load_emoji(emoji_folder)
        drawings = [] if emoji is None else list(_drawings(emoji))
        if not photos and not drawings:
            raise UserError(
                "there are no photographs and no drawings: give shards, or a folder of microvlm-data emoji."
            )
        return cls(_split_series(photos), emoji, drawings)

    def pixels(self, drawing: Drawing) -> np.ndarray:
        """uint8 [S, S, 4] with straight alpha."""
        if drawing.sheet not in self._sheets:
            self._sheets[drawing.sheet] = self._open_sheet(drawing.sheet)
        return np.asarray(self._sheets[drawing.sheet][drawing.row])

    def _open_sheet(self, sheet: str) -> np.ndarray:
        assert self._emoji is not None
        if sheet == "drawings":
            return load_drawings(self._emoji.folder).pixels
        rendered = [
            size for size in DRAWING_SIZES if (self._emoji.folder / f"rgba{size}" / f"{sheet}.npy").is_file()
        ]
        return self._emoji.images(sheet, rendered[0] if rendered else DRAWING_SIZES[-1])


def read_shard(shard: Path) -> Iterable[Photo]:
    """The photographs of a WebDataset shard, `KEY.jpg` with `KEY.json` beside it. Raises UserError."""
    try:
        with tarfile.open(shard) as tar:
            members = {member.name: member for member in tar if member.isfile()}
            for name, member in members.items():
                stem, _, ending = name.rpartition(".")
                if ending != "jpg":
                    continue
                about = tar.extractfile(members[f"{stem}.json"])
                assert about is not None
                document = json.loads(about.read())
                key = str(document.get("key", f"{shard.stem}/{stem}"))
                label = document.get("label")
                if not isinstance(label, str | None):
                    raise ValueError("a label is a text or null")
                source = str(document.get("source", shard.stem))
                split = "test" if source in EVALUATION_ONLY else split_of(key)
                yield Photo(shard, member.offset_data, member.size, key, label, source, split)
    except (OSError, tarfile.TarError, AttributeError, KeyError, ValueError):
        raise UserError(
            f"{shard} is no shard of pictures with JSON beside them: give another, or build it again."
        ) from None


def split_of(key: str) -> Split:
    """The split of a picture by the sha256 of its key: 80 % train, 7 % calibration, 13 % test."""
    percent = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100
    return "train" if percent < 80 else "calibration" if percent < 87 else "test"


def _split_series(photos: Sequence[Photo]) -> list[Photo]:
    """Photographs whose names are numbers of a series split by their place in it: neighbours show the same things.

    Of each label the last 13 % are test and the 7 % before them calibration. Only `grocery` has such series.
    """
    numbers: dict[str | None, list[tuple[int, int]]] = defaultdict(list)
    for index, photo in enumerate(photos):
        match = re.search(r"(\d+)(\.\w+)?$", photo.key)
        if photo.source == "grocery" and match:
            numbers[photo.label].append((int(match[1]), index))
    result = list(photos)
    for series in numbers.values():
        for place, (_, index) in enumerate(sorted(series)):
            share = place / len(series)
            split: Split = "train" if share < 0.8 else "calibration" if share < 0.87 else "test"
            result[index] = dataclasses.replace(result[index], split=split)
    return result


def _drawings(emoji: EmojiData) -> Iterable[Drawing]:
    """Named drawings (emoji that the model learns, in every vendor's style) and unnamed ones.

    Emoji of the other splits and drawings without captions are unnamed; a hash decides which of them are trained on.
    Vendors that are held out are in one split alone.
    """
    for vendor in (*TRAIN_VENDORS, *_HELD_OUT_VENDORS):
        own = _HELD_OUT_VENDORS.get(vendor)
        for row in np.flatnonzero(emoji.present(vendor)).tolist():
            named = emoji.splits[row] == "seen"
            split = (own or "train") if named else split_of(emoji.hexcodes[row])
            if own in (None, split):
                yield Drawing(vendor, row, emoji.captions[row] if named else None, split)
    try:
        others = load_drawings(emoji.folder)
    except UserError:
        return
    for row in range(len(others.pixels)):
        yield Drawing("drawings", row, None, split_of(f"drawing {row}"))
