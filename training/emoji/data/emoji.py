"""The emoji data: captions, vendors' drawings and splits. Opens what `microvlm-data emoji` has built.

Tables and hashing only: no rendering, no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import zipfile
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from microvlm.escaping import printable
from microvlm.formats import documents
from microvlm.formats.documents import quote
from microvlm.training.emoji.data.drawing_sources import LABELS_PACKAGE, DataError, IconSet, read_json

CORE_VENDORS = ("noto", "twemoji", "fluent-emoji", "fluent-emoji-flat", "openmoji", "emojione")
SEEN_MINIMUM = 540
"""Minimum number of seen emoji, which are also the test emoji."""
SKIPPED_GROUPS = ("component", "flags")
EMOJI_FORMAT = "microvlm-emoji-1"

# A joined sequence with an explicit man or woman is a gender variant of the neutral one.
_GENDERED = re.compile(r"1F468|1F469")

Text = Annotated[str, Meta(max_length=1000)]
VendorName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,63}\Z")]
"""Name of a set of drawings, which is a file's name too."""


class _Head(msgspec.Struct, frozen=True):
    format: str = ""


class _EmojiRow(msgspec.Struct, frozen=True):
    hexcode: Annotated[str, Meta(pattern=r"^[0-9A-Fa-f]{2,6}(-[0-9A-Fa-f]{2,6})*\Z")]
    caption: Text
    group: Text
    subgroup: Text
    core: bool
    split: Literal["seen", "held_out", "extra"]


class _EmojiTable(msgspec.Struct, frozen=True):
    """A folder's emoji.json."""

    emoji: Annotated[list[_EmojiRow], Meta(min_length=1, max_length=100_000)]
    present: dict[VendorName, list[bool]]

    def __post_init__(self) -> None:
        wrong = [vendor for vendor, drawn in self.present.items() if len(drawn) != len(self.emoji)]
        if wrong:
            raise ValueError(f"present.{wrong[0]} must have one value for each of {len(self.emoji)} emoji")


class _Label(msgspec.Struct, frozen=True):
    """An emoji in the package of labels."""

    hexcode: str
    label: Text
    order: int | None = None
    group: int | None = None
    subgroup: int | None = None
    gender: Any = msgspec.UNSET


class _Groups(msgspec.Struct, frozen=True):
    groups: dict[str, Text]
    subgroups: dict[str, Text]


@dataclass(frozen=True)
class Emoji:
    """One captioned emoji."""

    hexcode: str
    caption: str
    group: str
    subgroup: str


def _ascii(text: str) -> str:
    """Straighten curly quotes and drop accents, so that a tiny tokenizer can spell every caption."""
    text = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def slug(label: str) -> str:
    """The icon name for a label: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", _ascii(label).lower().replace("&", "and").replace("'", "")).strip("-")


def captioned(root: Path) -> list[Emoji]:
    """Every emoji with an English label, in Unicode order, without flags, components, skin tones
    and gender variants. Captions are lower-case ASCII and unique.
    """
    folder = root / LABELS_PACKAGE[0]
    rows = read_json(folder / "en" / "data.json", list[_Label])
    meta = read_json(folder / "meta" / "groups.json", _Groups)
    ranked_emoji = []
    for row in rows:
        group = meta.groups.get(str(row.group), "component")
        code = row.hexcode
        has_gender = row.gender is not msgspec.UNSET
        if group in SKIPPED_GROUPS or has_gender or ("-200D-" in code and _GENDERED.search(code)):
            continue
        subgroup = meta.subgroups.get(str(row.subgroup))
        if row.order is None or subgroup is None:
            raise DataError(
                f"The emoji packages are damaged: {quote(row.label)} has no place among the others."
            )
        ranked_emoji.append((row.order, Emoji(code, _ascii(row.label).lower(), group, subgroup)))
    emoji = [e for _, e in sorted(ranked_emoji, key=lambda pair: pair[0])]
    if len({e.caption for e in emoji}) != len(emoji):
        raise DataError("The label package gives one caption to two emoji: use the pinned version.")
    return emoji


def match_names(emoji: list[Emoji], sets: dict[str, IconSet], root: Path) -> dict[str, list[str | None]]:
    """The icon name of each emoji in each set; None if the vendor did not draw it.

    If a set has a table of characters, the table decides. Otherwise the name is the slug of the label or of the Unicode
    name, or the name that another set's table gives to the same character.
    """
    unicode_names = read_json(root / LABELS_PACKAGE[0] / "meta" / "unicode-names.json", dict[str, str])
    # Misleading names, found by looking at every drawing; null stands for "not drawn".
    by_hand: dict[str, dict[str, str | None]] = json.loads(_packaged("names.json"))
    matched: dict[str, list[str | None]] = {}
    for vendor, icons in sets.items():
        names: list[str | None] = []
        for e in emoji:
            codes = [e.hexcode.lower(), e.hexcode.lower().replace("-fe0f", "")]
            own = [icons.chars[c] for c in codes if c in icons.chars]
            others = [s.chars[c] for s in sets.values() for c in codes if c in s.chars]
            guesses = own or [slug(e.caption), slug(unicode_names.get(e.hexcode, "")), *others]
            if vendor == "fxemoji":
                guesses = [g.replace("-", "") for g in guesses]
            if e.caption in by_hand.get(vendor, {}):
                guesses = [by_hand[vendor][e.caption] or ""]
            names.append(next((g for g in guesses if g in icons), None))
        matched[vendor] = names
    return matched


def hash_percent(hexcode: str) -> int:
    """0..99 from the sha256 of the upper-case hexcode. Nothing else decides a split."""
    return int(hashlib.sha256(hexcode.upper().encode()).hexdigest(), 16) % 100


def split_emoji(hexcodes: list[str], core: list[bool]) -> list[str]:
    """The split of each emoji: `seen` or `held_out` for core emoji, `extra` for the others.

    `seen` is hash_percent < T with the smallest T among multiples of 5 that gives SEEN_MINIMUM.
    """
    percents = [hash_percent(h) if c else 100 for h, c in zip(hexcodes, core, strict=True)]
    steps = (t for t in range(5, 101, 5) if sum(p < t for p in percents) >= SEEN_MINIMUM)
    threshold = next(steps, 100)
    return ["extra" if p == 100 else "seen" if p < threshold else "held_out" for p in percents]


def _packaged(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def read_test_emoji() -> list[tuple[str, str]]:
    """The committed list of test emoji, fixed before any training: (hexcode, caption)."""
    rows = [line.split("\t") for line in _packaged("test_emoji.txt").splitlines() if line]
    return [(code, caption) for code, caption in rows]


@dataclass(frozen=True)
class EmojiData:
    """An opened folder of rendered emoji: N emoji in Unicode order, which every list and array follows.

    It is all that the trainer, the stages and the score command know of the data.
    """

    folder: Path
    hexcodes: list[str]
    captions: list[str]
    groups: list[str]
    subgroups: list[str]
    splits: list[str]
    core: np.ndarray
    """bool [N]: drawn by all CORE_VENDORS."""
    vendors: list[str]
    _present: dict[str, Any] = field(repr=False)

    @property
    def is_seen(self) -> np.ndarray:
        """bool [N]: the fixed test emoji. Their captions are trained on, with the TRAIN vendors' drawings."""
        return np.array([s == "seen" for s in self.splits])

    @property
    def held_out(self) -> np.ndarray:
        """bool [N]: core emoji whose captions are never used in training."""
        return np.array([s == "held_out" for s in self.splits])

    def images(self, vendor: str, size: int = 96) -> np.ndarray:
        """uint8 [N, size, size, 4], straight alpha, memory-mapped; all zero where not drawn."""
        path = self.folder / f"rgba{size}" / f"{vendor}.npy"
        if not path.is_file():
            raise DataError(f"{self.folder} has no {size} px images of {vendor}: run microvlm-data emoji.")
        return open_pixels(path, len(self.hexcodes), size, "delete the folder and run microvlm-data emoji")

    def present(self, vendor: str) -> np.ndarray:
        """bool [N]: which emoji the vendor drew. Raises DataError for a vendor that the folder does not list."""
        if vendor not in self._present:
            raise DataError(f"{self.folder} lists no drawings of {vendor}: run microvlm-data emoji.")
        return np.array(self._present[vendor], dtype=bool)

    def index(self, hexcode: str) -> int:
        """Row of this emoji. Raises DataError if the folder lacks it."""
        try:
            return self.hexcodes.index(hexcode)
        except ValueError:
            raise DataError(f"{self.folder} lacks the emoji {hexcode}: build it again.") from None


def load_emoji(folder: str | Path) -> EmojiData:
    """Open the folder that `microvlm-data emoji -o FOLDER` wrote. Raises UserError if it cannot be used."""
    folder = Path(folder)
    path = folder / "emoji.json"
    remedy = "delete the folder and build it again with microvlm-data emoji"
    try:
        content = documents.read_file(path)
    except FileNotFoundError:
        raise DataError(f"{folder} holds no emoji.json: run microvlm-data emoji -o {folder}.") from None
    if documents.parse(content, _Head, path, remedy).format != EMOJI_FORMAT:
        raise DataError(f"{path} is not in the format {EMOJI_FORMAT}: {remedy}.")
    table = documents.parse(content, _EmojiTable, path, remedy)
    return EmojiData(
        folder=folder,
        hexcodes=[row.hexcode for row in table.emoji],
        captions=[row.caption for row in table.emoji],
        groups=[row.group for row in table.emoji],
        subgroups=[row.subgroup for row in table.emoji],
        splits=[row.split for row in table.emoji],
        core=np.array([row.core for row in table.emoji], dtype=bool),
        vendors=list(table.present),
        _present=table.present,
    )


def open_pixels(path: Path, count: int, size: int, remedy: str) -> np.ndarray:
    """The drawings in a .npy file, uint8 [count, size, size, 4], memory-mapped. Raises DataError for another array."""
    try:
        pixels = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError, OverflowError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({printable(str(error))}): {remedy}.") from None
    shape = (count, size, size, 4)
    if not isinstance(pixels, np.ndarray) or pixels.shape != shape or pixels.dtype != np.uint8:
        raise DataError(f"{path} does not hold {count} drawings of {size} pixels: {remedy}.")
    return pixels
