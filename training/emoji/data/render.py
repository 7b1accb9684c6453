"""Renders the vendors' SVG drawings to RGBA pixels and writes the emoji folder."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from microvlm.atomic_folder import new_folder
from microvlm.training.emoji.data import emoji as table
from microvlm.training.emoji.data.drawing_sources import SOURCES, TRAIN_VENDORS, DataError, IconSet

Progress = Callable[[str, int, int], None]
"""Called with (vendor and size, done, total) after every drawing."""


def rasterise(svg: str, size: int) -> np.ndarray:
    """Render an SVG document, centred and with its aspect ratio: uint8 [size, size, 4] RGBA with straight alpha."""
    import resvg_py

    # Giving the width alone keeps the aspect ratio; for a tall drawing the height is given instead.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size != (size, size):
        if image.height > size:
            png = resvg_py.svg_to_bytes(svg_string=svg, height=size, skip_system_fonts=True)
            image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        square = Image.new("RGBA", (size, size))
        square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = square
    return np.asarray(image)


def render_vendor(icons: IconSet, names: list[str | None], size: int, progress: Progress) -> np.ndarray:
    """Render the icons `names` of one vendor: uint8 [N, size, size, 4]; all zero for None."""
    pixels = np.zeros((len(names), size, size, 4), np.uint8)
    for i, name in enumerate(names):
        if name is not None:
            try:
                pixels[i] = rasterise(icons.svg(name), size)
            except ValueError as error:
                vendor = icons.source.vendor
                raise DataError(
                    f"The emoji packages are damaged: {vendor} {name} is not an SVG ({error})."
                ) from None
        progress(f"{icons.source.vendor} {size}px", i + 1, len(names))
    return pixels


def build(root: Path, out: Path, sizes: list[int], vendors: list[str] | None, progress: Progress) -> dict:
    """Render the emoji folder `out`; returns the summary that --json prints.

    root : a node_modules folder. sizes : 96 is rendered for every vendor, other sizes for the TRAIN vendors. vendors :
    render only these, at all sizes, and keep the rest; None renders all.
    Raises DataError. A failed build leaves `out` as it was.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not _is_emoji_folder(out))):
        raise DataError(f"{out} exists and is not an emoji folder: choose another --output.")
    sets = {s.vendor: IconSet(s, root) for s in SOURCES}
    emoji = table.captioned(root)
    names = table.match_names(emoji, sets, root)
    core = [all(names[v][i] is not None for v in table.CORE_VENDORS) for i in range(len(emoji))]
    splits = table.split_emoji([e.hexcode for e in emoji], core)
    with new_folder(out, replace=_is_emoji_folder, keep_others=True) as temporary:
        for size in sizes:
            (temporary / f"rgba{size}").mkdir()
            for vendor in vendors or list(sets):
                if size == 96 or vendors or vendor in TRAIN_VENDORS:
                    pixels = render_vendor(sets[vendor], names[vendor], size, progress)
                    np.save(temporary / f"rgba{size}" / f"{vendor}.npy", pixels)
        rows = [
            {
                "hexcode": e.hexcode,
                "caption": e.caption,
                "group": e.group,
                "subgroup": e.subgroup,
                "core": core[i],
                "split": splits[i],
            }
            for i, e in enumerate(emoji)
        ]
        present = {v: [n is not None for n in column] for v, column in names.items()}
        document = {"format": table.EMOJI_FORMAT, "emoji": rows, "present": present}
        (temporary / "emoji.json").write_text(json.dumps(document), encoding="utf-8")
    return {
        "output": str(out),
        "sizes": sizes,
        "emoji": len(emoji),
        "core": sum(core),
        "seen": splits.count("seen"),
        "held_out": splits.count("held_out"),
        "present": {v: sum(column) for v, column in present.items()},
    }


def _is_emoji_folder(folder: Path) -> bool:
    return (folder / "emoji.json").exists()
