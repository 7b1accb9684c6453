"""`microvlm-data`: builds training images, the evaluation set and the memory objects, and scores the baselines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from microvlm.console import after_saving, echo, note, print_json, run_click
from microvlm.terminal.step_progress import step, waiting
from microvlm.training.data.download.cc12m_command import cc12m
from microvlm.training.data.download.models_command import models
from microvlm.training.data.examples.examples_command import examples
from microvlm.training.data.images.images_command import images
from microvlm.training.data.names_command import names
from microvlm.training.data.sampled_command import sampled
from microvlm.training.data.strangers.strangers_command import strangers
from microvlm.training.emoji.data.drawing_sources import SOURCES, TEST_VENDOR, find_packages
from microvlm.training.photo.data.captioned_command import captioned
from microvlm.training.photo.data.photo_command import photo


@click.group()
def command() -> None:
    """Build folders of training data: your captioned pictures, photographs, drawn scenes, texts, and parts of models.

    \b
    Example: microvlm-data images captions.jsonl -o data/mine
    """


command.add_command(cc12m)
command.add_command(models)
command.add_command(images)
command.add_command(examples)
command.add_command(photo)
command.add_command(captioned)
command.add_command(names)
command.add_command(strangers)
command.add_command(sampled)


class _Progress:
    """Shows progress on stderr: a bar on a terminal, one line per vendor and size elsewhere."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.label = ""

    def __call__(self, label: str, finished_count: int, total: int) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            if label != self.label:
                self.bar = tqdm(total=total, desc=label, file=sys.stderr)
            self.bar.update(1)
            if finished_count == total:
                self.bar.close()
        elif finished_count == total:
            note(f"{label}: {total} drawings")
        self.label = label


@command.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to build.")
@click.option("--packages", type=click.Path(path_type=Path), help="An existing node_modules folder.")
@click.option(
    "--size", "sizes", type=click.IntRange(16, 512), multiple=True, default=(96,), help="Pixels a side."
)
@click.option(
    "--vendor",
    "vendors",
    type=click.Choice([s.vendor for s in SOURCES]),
    multiple=True,
    help="Draw only these.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def emoji(
    output: Path, packages: Path | None, sizes: tuple[int, ...], vendors: tuple[str, ...], as_json: bool
) -> None:
    """Render the emoji of every vendor (96 px), and of the training vendors at other sizes.

    \b
    Example: microvlm-data emoji -o data/emoji --size 96
    """
    from microvlm.training.emoji.data.render import build

    summary = build(find_packages(packages), output, sorted(set(sizes)), list(vendors) or None, _Progress())
    _print_build(
        summary,
        as_json,
        f"{summary['emoji']} captioned emoji, {summary['core']} drawn by every core vendor",
        f"{summary['seen']} test emoji (seen), {summary['held_out']} with held-out names",
        *(f"  {vendor:28s}{count:6d}" for vendor, count in summary["present"].items()),
    )


@command.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="An emoji folder.")
@click.option("--packages", type=click.Path(path_type=Path), help="An existing node_modules folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def drawings(output: Path, packages: Path | None, as_json: bool) -> None:
    """Render thousands of icons without captions (96 px), which the memory learns to tell apart.

    \b
    Example: microvlm-data drawings -o data/emoji
    """
    from microvlm.training.emoji.data.drawings import build_drawings

    summary = build_drawings(packages, output, _Progress())
    _print_build(
        summary,
        as_json,
        f"{summary['drawings']} drawings in {summary['output']}",
        *(f"  {vendor:28s}{count:6d}" for vendor, count in summary["sets"].items()),
    )


@command.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def evalset(folder: Path, output: Path, as_json: bool) -> None:
    """Write the evaluation set from the rendered emoji in FOLDER.

    \b
    Example: microvlm-data evalset data/emoji -o evalset
    """
    from microvlm.training.emoji.data.emoji import load_emoji
    from microvlm.training.emoji.data.evalset import build_evalset

    version = next(s.version for s in SOURCES if s.vendor == TEST_VENDOR)
    with waiting("composing the evaluation set"):
        summary = build_evalset(load_emoji(folder), output, version)
    _print_build(
        summary,
        as_json,
        "{images} images, {scenes} scene questions, {episodes} episodes".format(**summary),
        f"{summary['bytes']:,} bytes in {summary['output']}",
    )


@command.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def memoryset(folder: Path, output: Path, as_json: bool) -> None:
    """Write the objects of `microvlm-bench memory` from the rendered emoji in FOLDER.

    \b
    Example: microvlm-data memoryset data/emoji -o memoryset
    """
    from microvlm.training.emoji.data.emoji import load_emoji
    from microvlm.training.emoji.data.memoryset import OTHER_VENDOR, build_memoryset

    versions = {source.vendor: source.version for source in SOURCES}
    step("choosing the objects")
    summary = build_memoryset(load_emoji(folder), output, versions[TEST_VENDOR], versions[OTHER_VENDOR])
    _print_build(
        summary, as_json, f"{summary['objects']} objects, {summary['bytes']:,} bytes in {summary['output']}"
    )


@command.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--pixels-only", is_flag=True, help="Leave out the network, which takes minutes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def baselines(folder: Path, pixels_only: bool, as_json: bool) -> None:
    """Score the nearest class mean of pixels and of EfficientNet-Lite0 on the test emoji of FOLDER.

    \b
    Example: microvlm-data baselines data/emoji --pixels-only
    """
    from microvlm.training.emoji.data.baselines import run_baselines
    from microvlm.training.emoji.data.emoji import load_emoji

    with waiting("fitting class means"):
        result = run_baselines(load_emoji(folder), teacher=not pixels_only)
    if as_json:
        print_json(result)
        return
    echo(f"{result['classes']} test emoji, fitted on {', '.join(result['fitted_on'])}")
    for name in ("pixels_24", "efficientnet_lite0"):
        for vendor, score in result.get(name, {}).items():
            echo(f"  {name:20s}{vendor:12s}{score:7.3f}")


def _print_build(summary: dict[str, Any], as_json: bool, *lines: str) -> None:
    """Print about a folder that is written: its summary as JSON, or lines for people."""
    with after_saving():
        if as_json:
            print_json(summary)
        for line in () if as_json else lines:
            echo(line)


def whole_command() -> click.Command:
    """The command of the console script."""
    return command


def main() -> None:
    run_click(whole_command())
