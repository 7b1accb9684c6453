"""Builds and opens drawings of many things in many styles, without captions, which the memory learns to tell apart.

They are coloured icons; of the variants of one icon (other sizes, opened folders, flat copies) one is kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from microvlm.atomic_folder import new_folder
from microvlm.formats import documents
from microvlm.training.emoji.data.drawing_sources import DataError, IconSet, Source, install_packages
from microvlm.training.emoji.data.emoji import Text, open_pixels
from microvlm.training.emoji.data.render import Progress, render_vendor

DRAWING_SOURCES = (
    Source("circle-flags", "1.2.11", "Circle Flags, HatScripts", "MIT", "drawings"),
    Source(
        "cryptocurrency-color", "1.2.4", "Cryptocurrency Icons, Christopher Downer", "CC0-1.0", "drawings"
    ),
    Source("devicon", "1.2.68", "Devicon, konpa", "MIT", "drawings"),
    Source("flat-color-icons", "1.2.3", "Flat Color Icons, Icons8", "MIT", "drawings"),
    Source("fluent-color", "1.2.21", "Fluent UI System Color Icons, Microsoft", "MIT", "drawings"),
    Source("material-icon-theme", "1.2.70", "Material Icon Theme, Material Extensions", "MIT", "drawings"),
    Source("meteocons", "1.2.4", "Meteocons, Bas Milius", "MIT", "drawings"),
    Source("streamline-color", "1.2.2", "Streamline color icons", "CC-BY-4.0", "drawings"),
    Source("streamline-cyber-color", "1.2.2", "Streamline Cyber color icons", "CC-BY-4.0", "drawings"),
    Source("streamline-freehand-color", "1.2.2", "Streamline Freehand color icons", "CC-BY-4.0", "drawings"),
    Source("streamline-kameleon-color", "1.2.2", "Streamline Kameleon color icons", "CC-BY-4.0", "drawings"),
    Source("streamline-plump-color", "1.2.2", "Streamline Plump color icons", "CC-BY-4.0", "drawings"),
    Source("streamline-stickies-color", "1.2.2", "Streamline Stickies color icons", "CC-BY-4.0", "drawings"),
    Source("streamline-ultimate-color", "1.2.2", "Streamline Ultimate color icons", "CC-BY-4.0", "drawings"),
    Source("vscode-icons", "1.2.97", "VSCode Icons, Roberto Huertas", "MIT", "drawings"),
)
SIZE = 96
RESERVED_PERCENT = 12
"""Percentage of the drawings, chosen by hash, that is kept for `scope` stages."""
DRAWINGS_FORMAT = "microvlm-drawings-1"
_VARIANT = re.compile(
    r"^folder-|^file-type-light-|-(opened|open|wordmark|flat|duo|light)$|-(16|20|24|28|32)$"
)
_LEAST_INK = 0.04
"""Minimum share of the pixels that a drawing covers."""


class _DrawingsTable(msgspec.Struct, frozen=True):
    """drawings.json: the names of the drawings in their order."""

    format: str
    names: Annotated[list[Text], Meta(min_length=1, max_length=1_000_000)]


@dataclass(frozen=True)
class Drawings:
    """D rendered drawings, in the order of sets and names."""

    names: list[str]
    pixels: np.ndarray
    """uint8 [D, 96, 96, 4], straight alpha, memory-mapped."""

    @property
    def trained(self) -> np.ndarray:
        """bool [D]: drawings that `vlm` and `recall` stages use in facts."""
        hashed = [int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 for name in self.names]
        return np.array(hashed) >= RESERVED_PERCENT

    @property
    def reserved(self) -> np.ndarray:
        """bool [D]: drawings that only `scope` stages use in facts.

        A drawing that shares its name or its icon with a trained drawing of any set is neither trained nor reserved.
        """
        trained = self.trained
        stems = [_stem(name) for name in self.names]
        trained_stems = {stem for stem, is_trained in zip(stems, trained, strict=True) if is_trained}
        return ~trained & np.array([stem not in trained_stems for stem in stems])


def _stem(name: str) -> str:
    """The thing that a drawing shows: its name without set, kind of file, numbers and endings of variants."""
    return re.sub(
        r"^(file-type|lang)-|(-\d+|-fill|-original|-plain|-line|-dark)+$", "", name.partition("/")[2]
    )


def load_drawings(folder: str | Path) -> Drawings:
    """Open what `microvlm-data drawings` wrote into an emoji folder. Raises UserError if it is missing or damaged."""
    path = Path(folder) / "drawings"
    remedy = "delete it and build it again with microvlm-data drawings"
    try:
        document = documents.load(path / "drawings.json", _DrawingsTable, remedy)
    except FileNotFoundError:
        raise DataError(f"{folder} has no drawings: run microvlm-data drawings -o {folder}.") from None
    if document.format != DRAWINGS_FORMAT:
        raise DataError(f"{path} is not in the format {DRAWINGS_FORMAT}: {remedy}.")
    return Drawings(document.names, open_pixels(path / "rgba96.npy", len(document.names), SIZE, remedy))


def build_drawings(packages: Path | None, out: Path, progress: Progress) -> dict:
    """Render every source into `out`/drawings, which must not exist; returns the summary that --json prints.

    packages : a node_modules folder, or None to install the pinned packages. Raises DataError.
    """
    target = out / "drawings"
    if target.exists():
        raise DataError(f"{target} exists: delete it to build it again.")
    root = packages or install_packages({s.package: s.version for s in DRAWING_SOURCES}, "npm-drawings")
    names: list[str] = []
    parts: list[np.ndarray] = []
    counts: dict[str, int] = {}
    keys: set[bytes] = set()
    for source in DRAWING_SOURCES:
        icons = IconSet(source, root)
        icon_names = [name for name in sorted(icons.icons) if not _VARIANT.search(name)]
        pixels = render_vendor(icons, list(icon_names), SIZE, progress)
        own = [i for i, drawing in enumerate(pixels) if _is_new(drawing, keys)]
        names += [f"{source.vendor}/{icon_names[i]}" for i in own]
        parts.append(pixels[own])
        counts[source.vendor] = len(own)
    out.mkdir(parents=True, exist_ok=True)
    with new_folder(target) as temporary:
        np.save(temporary / "rgba96.npy", np.concatenate(parts))
        document = {"format": DRAWINGS_FORMAT, "names": names}
        (temporary / "drawings.json").write_text(json.dumps(document), encoding="utf-8")
    return {"output": str(target), "drawings": len(names), "sets": counts}


def _is_new(drawing: np.ndarray, keys: set[bytes]) -> bool:
    """Whether a drawing, uint8 [S, S, 4], covers enough pixels and resembles no earlier one (`keys`) when small."""
    if (drawing[..., 3] > 127).mean() < _LEAST_INK:
        return False
    side = drawing.shape[0] // 8
    small = drawing[: 8 * side, : 8 * side].reshape(8, side, 8, side, 4).mean((1, 3))
    key = (small // 16).astype(np.uint8).tobytes()
    new = key not in keys
    keys.add(key)
    return new
