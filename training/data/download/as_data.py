"""Makes a data folder of downloaded shards: what `microvlm-data images` does, and again when there are more shards.

The data folder is a copy, because a trainer reads single samples, needs splits without repeated pictures, and must not
meet a picture that cannot be decoded. The shards may be deleted when no more pictures will be fetched.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec

from microvlm.atomic import os_errors_about
from microvlm.console import note

DATA = "data"
MAX_SIDE = 640
"""Pixels of a longer side: 256 times 2.5, the longest shape that CC12M's own filter let through."""


def build_data(folder: Path, shards: list[Path], most: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """Build FOLDER/data of at most `most` pictures of WebDataset shards, in the place of one of other shards.

    Returns the summary of `microvlm-data images` and its lines. Goes on with a build that was cut off. Raises UserError
    when no picture can be used.
    """
    from microvlm.training.data.images.build import BuildOptions, build
    from microvlm.training.data.images.conversation import Columns
    from microvlm.training.data.images.images_command import (
        BuildProgress,
        default_workers,
        summarize,
        summary_lines,
    )
    from microvlm.training.data.images.shard_source import ShardSource

    options = BuildOptions(max_side=MAX_SIDE, max_images=most)
    source = ShardSource(shards, Columns(), options.max_text)
    final = folder / DATA
    # Each set of shards has a folder of its own until it is whole, so that an older one is there meanwhile.
    output = folder / f"{DATA}-{source.identity()[:12]}-{most or 'all'}"
    with os_errors_about(final):
        for path in folder.glob(f"{DATA}-*"):
            if not path.name.startswith(output.name):
                shutil.rmtree(path)  # of other shards, and interrupted
    if _is_built_of(final, source.identity(), options):
        output = final
    else:
        note(f"copying the pictures of {len(shards)} shards into {final}")
    progress = BuildProgress()
    try:
        built = build([source], output, options, default_workers(), progress)
    finally:
        progress.close()
    summary = summarize(built) | {"output": str(final)}
    if output != final:
        with os_errors_about(final):
            if final.is_dir():
                shutil.rmtree(final)
            os.rename(output, final)
    return summary, summary_lines(summary, options)


def _is_built_of(folder: Path, identity: str, options: Any) -> bool:
    """Whether a data folder was built of these shards with these options."""
    from microvlm.training.data.data_folder import DATA_FILE, ShardedData

    if not (folder / DATA_FILE).is_file():
        return False
    description = ShardedData(folder).description
    same = description.options == msgspec.to_builtins(options)
    return same and [source.get("sha256") for source in description.sources] == [identity]
