"""Folders that are built once from a recipe: aside, then renamed, so that a half-built one is never seen.

A folder is named by the hash of its recipe and holds `stamp.json`: the recipe, and how many files and bytes it had. The
stamp's time says when the folder was asked for last (the folder's own, in caches of before).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from microvlm.backends.resolve import cache_directory

STAMP = "stamp.json"
FORMAT = 1
"""Counted up when a builder's code changes what it writes."""
KEPT_DAYS = 30
PRUNED = ("site", "package", "library", "wheels")
"""Kinds of which every version of the package makes another folder: unused for KEPT_DAYS, one goes. A sysroot stays,
for views link into it."""


def cached_folder(kind: str, recipe: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder that `build` fills for `recipe`, below the user's cache; built again where it is not whole.

    Raises what `build` raises, and OSError where the cache can't be written; neither leaves anything behind.
    """
    recipe = {"format": FORMAT, **recipe}
    parent = cache_directory() / "emulation"
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    final = parent / f"{kind}-{digest[:16]}"
    if is_whole(final, recipe):
        with contextlib.suppress(OSError):  # a cache that others may only read
            # The stamp and not the folder: a Python reads a folder of modules anew whose time has changed, and a count
            # of instructions that is under way would come out otherwise.
            os.utime(final / STAMP)
        return final
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent)
    _remove_unused(parent)
    aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.{os.getpid()}.", dir=parent))
    try:
        tree = aside / "tree"
        tree.mkdir()
        build(tree)
        (tree / STAMP).write_text(json.dumps({"recipe": recipe, **measure(tree)}))
        _put(tree, final, aside, recipe)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def is_whole(folder: Path, recipe: dict[str, Any]) -> bool:
    """Is this what `recipe` made, with every file in it?"""
    try:
        stamp = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return False
    return stamp == {"recipe": recipe, **measure(folder)}


def measure(folder: Path) -> dict[str, int]:
    """`files` and `bytes` below a folder, but for the stamp and for bytecode, which the emulated Python adds to."""
    files = total = 0
    for directory, _, names in os.walk(folder):
        if os.path.basename(directory) == "__pycache__":
            continue
        for name in names:
            if name != STAMP:
                files += 1
                total += os.lstat(os.path.join(directory, name)).st_size
    return {"files": files, "bytes": total}


def _put(tree: Path, final: Path, aside: Path, recipe: dict[str, Any]) -> None:
    if final.exists() and not is_whole(final, recipe):
        os.rename(final, aside / "damaged")
    try:
        os.rename(tree, final)
    except OSError:
        # Another process was first. Its folder is as good as ours.
        if not is_whole(final, recipe):
            raise


def _remove_abandoned(parent: Path) -> None:
    """Folders of builders that no longer run."""
    for path in parent.glob(".*.*.*"):
        pid = path.name.split(".")[2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)


def _remove_unused(parent: Path) -> None:
    """Folders of the pruned kinds that nothing asked for lately."""
    oldest = time.time() - KEPT_DAYS * 86400
    for kind in PRUNED:
        for path in parent.glob(f"{kind}-*"):
            with contextlib.suppress(OSError):  # another process may be at it too
                used = [each.stat().st_mtime for each in (path, path / STAMP) if each.exists()]
                if max(used) < oldest:
                    shutil.rmtree(path, ignore_errors=True)
