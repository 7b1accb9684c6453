"""Symbolic links in a model's folder: they may lead into that folder, or to the blobs of a Hugging Face hub cache.

The cache of huggingface_hub keeps a file's content once, named by its hash, and a snapshot is a folder of links:
`REPOSITORY/snapshots/REVISION/FILE -> ../../blobs/HASH`. With a store that repositories share, that blob is a link too,
to `CACHE/blobs/HA/HASH`. Imports the standard library only.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""Names of blobs: git's SHA-1 of a small file, the SHA-256 of a large one, or the hash of the shared store."""


def leads_into(path: str | Path, folder: str | Path) -> bool:
    """Whether `path`, all links followed, lies in `folder` or is a blob of the hub cache whose snapshot it is.

    True also for a path that does not exist but would lie there. A model's file for which this is False must not be
    read: whoever wrote the folder could make any file of the reader's part of the model.
    """
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return real.is_relative_to(root) or (bool(_HASH.fullmatch(real.name)) and _in_blobs(real, root))


def _in_blobs(real: Path, snapshot: Path) -> bool:
    if real.parent == snapshot.parent / "blobs":
        return True
    if snapshot.parent.name != "snapshots":
        return False
    repository = snapshot.parent.parent
    shared_store = repository.parent / "blobs"
    return real.parent in (repository / "blobs", shared_store / real.name[:2])
