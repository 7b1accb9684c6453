"""`microvlm-data photo`: composes pictures and encodes them, for the training of the preset `photo`."""

from __future__ import annotations

from pathlib import Path

import click

from microvlm.console import echo
from microvlm.errors import UserError
from microvlm.terminal.step_progress import step

pictures_option = click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A tar shard of labelled photographs, or a folder of them.",
)
emoji_option = click.option(
    "--emoji", type=click.Path(path_type=Path), help="A folder of microvlm-data emoji (and drawings)."
)
seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**31), default=2026, show_default=True, help="Of the composed pictures."
)
"""What commands that compose pictures have in common."""


@click.command()
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to build, or to complete."
)
@pictures_option
@emoji_option
@click.option(
    "--texts",
    type=click.Path(path_type=Path),
    help="Sentences for the tokenizer, a line each, or captions as JSON lines.",
)
@click.option(
    "--count",
    type=click.IntRange(256, 10_000_000),
    default=38_400,
    show_default=True,
    help="Training pictures.",
)
@seed_option
@click.option(
    "--held-out",
    type=click.Path(path_type=Path),
    help="Also write the pictures of calibration and test here, one a file, for microvlm-data images.",
)
@click.option(
    "--colours",
    is_flag=True,
    help="Also store the mean colour of each place, for a model that reads colours.",
)
@click.option("--workers", type=click.IntRange(1, 256), default=2, show_default=True, help="Processes.")
def photo(
    output: Path,
    pictures: tuple[Path, ...],
    emoji: Path | None,
    texts: Path | None,
    count: int,
    seed: int,
    held_out: Path | None,
    colours: bool,
    workers: int,
) -> None:
    """Compose scenes of photographs and drawings, and encode them once with a calibrated EfficientNet-Lite0.

    A shard is a tar file with KEY.jpg and KEY.json, which has a label (null for clutter) and a key.

    \b
    Example: microvlm-data photo -o data/photo --pictures shards --emoji data/emoji
    """
    from microvlm.training.photo.data.builder import CHUNK, Plan, build
    from microvlm.training.photo.data.held_out_pictures import write_pictures
    from microvlm.training.photo.data.sources import HELD_OUT, Sources

    shards = find_shards(pictures)
    if texts is not None and not texts.is_file():
        raise UserError(f"{texts} does not exist: give another file.")
    train = -(-count // CHUNK)
    few = max(2, train // 12)
    chunks = {
        "train": train, "calibration": few, "test": few,
        "plain": max(1, train * 2 // 5), "views": max(2, train // 2),
        "calibration_views": max(1, train // 40), "test_views": max(1, train // 40),
    }  # fmt: skip
    named = tuple(str(shard) for shard in shards)
    plan = Plan(
        named,
        None if emoji is None else str(emoji),
        seed,
        chunks,
        None if texts is None else str(texts),
        colours,
    )
    build(output, plan, workers, step)
    echo(f"{output}: {sum(chunks.values()) * CHUNK:,} pictures, of which {train * CHUNK:,} to train on")
    if held_out is not None:
        sources = Sources.open(shards, emoji)
        for split in HELD_OUT:
            written = write_pictures(sources, split, held_out, seed)
            echo(f"{held_out / f'{split}.jsonl'}: {written:,} pictures")
    echo(f"next: microvlm-train photo --data {output} -o runs/photo")


def find_shards(pictures: tuple[Path, ...]) -> list[Path]:
    """The tar shards that `--pictures` names, those of a folder sorted. Raises UserError for one that is missing."""
    shards = [
        shard for path in pictures for shard in (sorted(path.glob("*.tar")) if path.is_dir() else [path])
    ]
    without = [path for path in pictures if path.is_dir() and not any(path.glob("*.tar"))]
    if without:
        raise UserError(
            f"{without[0]} holds no tar shard: give one, or a folder of them (docs/training-photo.md)."
        )
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(f"{missing[0]} does not exist: give another file.")
    return shards
