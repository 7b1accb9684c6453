"""A cache of folders, each built once from a recipe and never seen half built.

A folder is named by the hash of its recipe and holds `stamp.json`: the recipe, the number of files and bytes that the
builder left, and one hash over all of them where they are few. The stamp's time says when the folder was last used (the
folder's own time in older caches).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from microvlm.atomic_folder import new_folder
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Count, Sha256
from microvlm.sources.cache_directory import cache_directory, writable_cache
from microvlm.temporary_folder import remove_leftovers

EMULATION = "emulation"
"""The folder of this cache below the user's."""
STAMP = "stamp.json"
CACHE_FORMAT = 1
"""Counted up when a builder's code changes what it writes."""
HASHED_BYTES = 64_000_000
"""A folder up to this size is hashed each time it is opened, in tens of milliseconds: libraries, packages, counts. The
files of a larger one (a system, wheels unpacked) were checked by hash when they were downloaded and are flushed before
the folder has its name; to hash them each time would take longer than most programs that run in them."""
KEPT_DAYS = 30
PRUNED = ("site", "package", "library", "wheels", "counts", "equivalence")
"""Kinds of which every version of the package makes another folder: unused for KEPT_DAYS, a folder is removed. A
sysroot stays, because views link into it."""


class Stamp(msgspec.Struct, frozen=True, omit_defaults=True):
    """A folder's stamp.json."""

    recipe: dict[str, Any]
    files: Count
    bytes: Count
    sha256: Sha256 | None = None
    """None of a large folder, and in stamps of older versions."""


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
            measured = measure(temporary)
            stamp = Stamp(recipe, measured["files"], measured["bytes"])
            if stamp.bytes <= HASHED_BYTES:
                stamp = msgspec.structs.replace(stamp, sha256=content_sha256(temporary))
            (temporary / STAMP).write_bytes(msgspec.json.encode(stamp))
    except UserError:
        # Another process may have built the same folder meanwhile.
        if not is_intact(folder, recipe):
            raise
    return folder


def is_intact(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether `folder` was built from `recipe` and still has as many files and bytes, and the same where hashed."""
    try:
        stamp = documents.load(folder / STAMP, Stamp, "build it again")
    except (FileNotFoundError, UserError):
        return False
    if (stamp.recipe, {"files": stamp.files, "bytes": stamp.bytes}) != (recipe, measure(folder)):
        return False
    return stamp.sha256 is None or stamp.sha256 == content_sha256(folder)


def measure(folder: Path) -> dict[str, int]:
    """`files` and `bytes` below a folder, without the stamp and bytecode, to which the emulated Python adds."""
    sizes = [os.lstat(path).st_size for path in _files_of(folder)]
    return {"files": len(sizes), "bytes": sum(sizes)}


def content_sha256(folder: Path) -> str:
    """sha256 over the names and contents of the files that `measure` counts; of a link, its target."""
    digest = hashlib.sha256()
    for path in sorted(_files_of(folder)):
        if os.path.islink(path):
            content = os.fsencode(os.readlink(path))
        else:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        digest.update(os.fsencode(os.path.relpath(path, folder)) + b"\0" + content)
    return digest.hexdigest()


def _files_of(folder: Path) -> Iterator[str]:
    for directory, _, names in os.walk(folder):
        if os.path.basename(directory) != "__pycache__":
            yield from (os.path.join(directory, name) for name in names if name != STAMP)


def _remove_unused(parent: Path) -> None:
    """Remove folders of the pruned kinds that were not used lately."""
    oldest = time.time() - KEPT_DAYS * 86400
    for kind in PRUNED:
        for path in parent.glob(f"{kind}-*"):
            with contextlib.suppress(OSError):  # another process may be at it too
                times_of_use = [each.stat().st_mtime for each in (path, path / STAMP) if each.exists()]
                if max(times_of_use) < oldest:
                    shutil.rmtree(path, ignore_errors=True)
