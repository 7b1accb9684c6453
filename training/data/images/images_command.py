"""`microvlm-data images`: makes a data folder of anyone's captioned pictures."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from microvlm.console import after_saving, echo, note, print_json
from microvlm.terminal.suggestions import FILE
from microvlm.training.data.caption_data import MAX_TEXT, SPLITS

_LINE_EVERY_S = 10.0


@click.command()
@click.argument("sources", type=FILE, nargs=-1, required=True, metavar="SOURCE...")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Data folder to write.")
@click.option(
    "--validation",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.05,
    show_default=True,
    help="Share of the samples that is held out to watch a training.",
)
@click.option(
    "--test",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.05,
    show_default=True,
    help="Share of the samples that is held out for scores.",
)
@click.option(
    "--max-side",
    type=click.IntRange(16, 4096),
    default=512,
    show_default=True,
    help="Pixels; a larger picture is scaled down to this.",
)
@click.option(
    "--min-side",
    type=click.IntRange(1, 4096),
    default=8,
    show_default=True,
    help="Pixels; a smaller picture is left out.",
)
@click.option(
    "--max-text",
    type=click.IntRange(1, MAX_TEXT),
    default=1000,
    show_default=True,
    help="Characters; a longer caption is left out.",
)
@click.option("--max-images", type=click.IntRange(1), help="Stop after so many samples.")
@click.option("--image-column", help="Key or column of the picture, where it is not guessed.")
@click.option("--caption-column", help="Key or column of the caption, where it is not guessed.")
@click.option("--hub-split", default="train", show_default=True, help="Split of a data set of a hub.")
@click.option(
    "--workers", type=click.IntRange(0, 256), help="Processes that look at pictures; 0: none of their own."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def images(
    sources: tuple[str, ...], output: Path, workers: int | None, as_json: bool, **options: Any
) -> None:
    """Look at captioned pictures, and write those that can be used as a data folder.

    SOURCE is a folder of pictures with captions beside them (a.jpg and a.txt, .caption or .json), a table
    (captions.csv, .tsv, .jsonl, .json or .parquet), WebDataset shards (*.tar, or their folder), or the id of a data set
    of a hub. Paths in a table are relative to its folder. Bad pictures and captions are left out, counted, and listed
    in skipped.jsonl. The same command goes on with a run that was cut off.

    \b
    Example: microvlm-data images captions.jsonl -o data/mine --max-side 384
    """
    from microvlm.training.data.images.build import BuildOptions, build
    from microvlm.training.data.images.conversation import Columns
    from microvlm.training.data.images.sources import open_sources

    chosen = BuildOptions(**options)
    columns = Columns(chosen.image_column, chosen.caption_column)
    opened = open_sources(list(sources), columns, chosen.max_text, chosen.hub_split)
    for source in opened:
        if source.kind == "hub":
            note(f"{source.name} is neither a file nor a folder here: reading it from the hub.")
        if source.kind == "labels":
            note(f"{source.name}: no captions beside the pictures, so each folder's name is their caption.")
    progress = BuildProgress()
    try:
        built = build(opened, output, chosen, default_workers() if workers is None else workers, progress)
    finally:
        progress.close()
    with after_saving():
        summary = summarize(built)
        if as_json:
            print_json(summary)
        else:
            echo("\n".join(summary_lines(summary, chosen)))


def summarize(built: Any) -> dict[str, Any]:
    """The command's JSON document."""
    description = built.description
    shards = {split: description.shards.get(split, []) for split in SPLITS}
    return {
        "output": str(built.folder),
        "complete_before": built.was_complete,
        "resumed_at": built.resumed_at,
        "read": description.read,
        "kept": sum(shard.samples for listed in shards.values() for shard in listed),
        "splits": {split: sum(shard.samples for shard in listed) for split, listed in shards.items()},
        "skipped": description.skipped,
        "repeated_pictures": description.repeated_pictures,
        "texts": description.texts,
        "shards": sum(map(len, shards.values())),
        "bytes": sum(s.bytes + s.index_bytes for listed in shards.values() for s in listed),
    }


def summary_lines(summary: dict[str, Any], options: Any) -> list[str]:
    """The summary as a table for people, with the next step."""
    output, splits, texts = summary["output"], summary["splits"], summary["texts"]
    lines = [f"{output} was complete already."] if summary["complete_before"] else []
    if summary["resumed_at"]:
        lines.append(f"went on after record {summary['resumed_at']:,}")
    lines.append(f"{'kept':32s}{summary['kept']:>12,} of {summary['read']:,} records")
    lines += [f"  {split:30s}{count:>12,}" for split, count in splits.items()]
    if summary["skipped"]:
        lines.append(
            f"{'left out':32s}{sum(summary['skipped'].values()):>12,}  listed in {output}/skipped.jsonl"
        )
        lines += [f"  {reason:30s}{count:>12,}" for reason, count in summary["skipped"].items()]
    if summary["repeated_pictures"]:
        lines.append(f"{'pictures with other text again':32s}{summary['repeated_pictures']:>12,}")
    lines.append(f"{'words of a text':32s}{texts['words_mean']:>12}  (most {texts['words_most']})")
    lines.append(f"{'different words':32s}{texts['vocabulary']:>12,}")
    lines.append(f"{'bytes':32s}{summary['bytes']:>12,}  in {summary['shards']} shards")
    for split, share in (("validation", options.validation), ("test", options.test)):
        if share and not splits[split]:
            lines.append(f"no {split} samples: there are too few pictures for a share of {share}")
    lines.append(f"Look at {output}/preview.jpg, then: microvlm-train test --data {output} -o RUN")
    return lines


def default_workers() -> int:
    """Processes that look at pictures where the user gives no number: one a core, at most eight."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, available)


class BuildProgress:
    """Shows how many records were read: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self.said = time.monotonic()

    def __call__(self, read: int, kept: int, left_out: int) -> None:
        if self.is_terminal:
            if self.bar is None:
                from tqdm import tqdm

                self.bar = tqdm(unit=" records", file=sys.stderr, initial=read - 1)
            self.bar.update(read - self.bar.n)
            if read % 100 == 0:
                self.bar.set_postfix(kept=kept, left_out=left_out)
        elif time.monotonic() - self.said > _LINE_EVERY_S:
            self.said = time.monotonic()
            note(f"{read:,} records read, {kept:,} kept, {left_out:,} left out")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
