"""Exports bundled models at 1.58 bits to FOLDER/MODEL, and puts each bundle into the user's cache as well: what runs
later finds it there and need not export it again. Usage: export.py FOLDER MODEL...
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from side_by_side import side_by_side

from microvlm.atomic_folder import new_folder
from microvlm.backends.resolve import BUNDLES, cached_bundle
from microvlm.formats.bundle import is_bundle, is_intact
from microvlm.sources.cache_directory import writable_cache
from microvlm.sources.model_source import find_model


def main(folder: Path, models: list[str]) -> int:
    commands = [
        ["microvlm-export", model, "-o", str(folder / model), "--bits", "1.58", "--force"] for model in models
    ]
    status = side_by_side(commands, [{}] * len(commands))
    if status == 0:
        writable_cache(BUNDLES)
        for model in models:
            share(folder / model, cached_bundle(find_model(model).folder))
    return status


def share(bundle: Path, target: Path) -> None:
    """Copy a bundle to where it is looked for, unless it is there."""
    if not is_intact(target):
        with new_folder(target, replace=is_bundle) as new:
            shutil.copytree(bundle, new, dirs_exist_ok=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
