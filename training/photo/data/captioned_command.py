"""`microvlm-data captioned`: composes training pictures with captions, for any model that learns captions."""

from __future__ import annotations

from pathlib import Path

import click

from microvlm.console import echo
from microvlm.terminal.step_progress import counted
from microvlm.training.photo.data.photo_command import (
    emoji_option,
    find_shards,
    pictures_option,
    seed_option,
)


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write into.")
@pictures_option
@emoji_option
@click.option(
    "--count",
    type=click.IntRange(1, 10_000_000),
    default=6000,
    show_default=True,
    help="Pictures.",
)
@seed_option
def captioned(output: Path, pictures: tuple[Path, ...], emoji: Path | None, count: int, seed: int) -> None:
    """Compose training pictures of photographs and drawings with captions, one a file.

    A shard is a tar file with KEY.jpg and KEY.json, which has a label (null for clutter) and a key. What the splits
    of `microvlm-data photo` hold out is not shown.

    \b
    Example: microvlm-data captioned -o composed --pictures shards --emoji data/emoji
    """
    from microvlm.training.photo.data.captioned_pictures import write_captioned
    from microvlm.training.photo.data.sources import Sources

    sources = Sources.open(find_shards(pictures), emoji)
    written = write_captioned(sources, output, count, seed, counted("pictures composed"))
    echo(f"{output / 'captions.jsonl'}: {written:,} pictures")
    echo(f"next: microvlm-data images {output / 'captions.jsonl'} -o DATA")
