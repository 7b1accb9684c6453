"""A cache of folders, each built once from a recipe and never seen half built.

A folder is named by the hash of its recipe and holds `stamp.json`: the recipe, and the number of files and bytes that
the builder left. The stamp's time says when the folder was last used (the folder's own time in older caches).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from microvlm.atomic_folder import new_folder
from microvlm.errors import UserError
from microvlm.sources.cache_directory import cache_directory, writable_cache
from microvlm.temporary_folder import remove_leftovers

EMULATION = "emulation"
"""The folder of this cache below the user's."""
STAMP = "stamp.json"
CACHE_FORMAT = 1
"""Counted up when a builder's code changes what it writes."""
KEPT_DAYS = 30
PRUNED = ("site", "package", "library", "wheels", "counts", "equivalence")
"""Kinds of which every version of the package makes another folder: unused for KEPT_DAYS, a folder is removed. A
sysroot stays, because views link into it."""


def cached_folder(kind: str, recipe: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder that `build` fills for `recipe`, below the user's cache; built again if it is not intact.

    Raises what `build` raises, and UserError when the cache cannot be written; neither leaves anything behind.
    """
    recipe = {"format": CACHE_FORMAT, **recipe}
    parent = cache_directory() / EMULATION
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    folder = parent / f"{kind}-{digest[:16]}"
    if is_intact(folder, recipe):
        with contextlib.suppress(OSError):  # a cache that others may only read
            # The stamp and not the folder: a Python reads a folder of modules anew whose time has changed, and a count
            # of instructions that is under way would come out otherwise.
            os.utime(folder / STAMP)
        return folder
    writable_cache(EMULATION)
    remove_leftovers(parent)
    _remove_unused(parent)
    try:
        with new_folder(folder, replace=lambda old: not is_intact(old, recipe)) as temporary:
            build(temporary)
            (temporary / STAMP).write_text(json.dumps({"recipe": recipe, **measure(temporary)}))
    except UserError:
        # Another process may have built the same folder meanwhile.
        if not is_intact(folder, recipe):
            raise
    return folder


def is_intact(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether `folder` was built from `recipe` and still has as many files and bytes."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return False
    return stamp == {"recipe": recipe, **measure(folder)}


def measure(folder: Path) -> dict[str, int]:
    """`files` and `bytes` below a folder, without the stamp and bytecode, to which the emulated Python adds."""
    files = total = 0
    for directory, _, names in os.walk(folder):
        if os.path.basename(directory) == "__pycache__":
            continue
        for name in names:
            if name != STAMP:
                files += 1
                total += os.lstat(os.path.join(directory, name)).st_size
    return {"files": files, "bytes": total}


def _remove_unused(parent: Path) -> None:
    """Remove folders of the pruned kinds that were not used lately."""
    oldest = time.time() - KEPT_DAYS * 86400
    for kind in PRUNED:
        for path in parent.glob(f"{kind}-*"):
            with contextlib.suppress(OSError):  # another process may be at it too
                times_of_use = [each.stat().st_mtime for each in (path, path / STAMP) if each.exists()]
                if max(times_of_use) < oldest:
                    shutil.rmtree(path, ignore_errors=True)
