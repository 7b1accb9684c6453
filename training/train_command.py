"""`microvlm-train`: trains a checkpoint by a recipe on a data folder; resumes a run that was stopped."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import click

from microvlm.commands.options import ThreadCount
from microvlm.console import after_saving, note, print_json, run_click
from microvlm.errors import UserError


@click.command()
@click.argument("recipe", default="nano")
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Folder that `microvlm-data emoji` wrote."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the run; an unfinished run in it resumes.",
)
@click.option(
    "--float-control",
    is_flag=True,
    help="Train the same recipe with float32 weights, to measure the cost of ternary ones.",
)
@click.option("--threads", type=ThreadCount(), default=None, help="CPU threads.")
@click.option(
    "--workers",
    type=ThreadCount(zero=True),
    default=0,
    show_default=True,
    help="Processes that draw batches ahead, for a GPU that would wait for one (Linux).",
)
@click.option(
    "--stop-after", type=click.IntRange(min=1), default=None, help="Save and stop after this many steps."
)
@click.option(
    "--start",
    default=None,
    help="A checkpoint (folder, hub id or nano) in place of the stages before --start-stage.",
)
@click.option("--start-stage", default=None, help="The first stage to run; needs --start.")
@click.option(
    "--fresh",
    multiple=True,
    metavar="PART",
    help="A part of the model (scope, ...) to initialise anew instead of taking it from --start.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    recipe: str,
    data: Path,
    output: Path,
    float_control: bool,
    threads: int | None,
    workers: int,
    stop_after: int | None,
    start: str | None,
    start_stage: str | None,
    fresh: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train RECIPE (a packaged name or a JSON file)."""
    import torch

    from microvlm.backends.threads import pool_threads
    from microvlm.training.emoji.data.emoji import load_emoji
    from microvlm.training.recipe import load_recipe
    from microvlm.training.trainer import train

    if workers and "fork" not in multiprocessing.get_all_start_methods():
        raise UserError("--workers needs a system that can fork: leave it out here.")
    if threads is not None:
        torch.set_num_threads(pool_threads(threads))
    loaded = load_recipe(recipe)
    emoji = load_emoji(data)
    complete = train(
        loaded, emoji, output, note, float_control, stop_after, start, start_stage, fresh, workers
    )
    if as_json:
        with after_saving():
            print_json({"output": str(output), "recipe": loaded.name, "complete": complete})


def main() -> None:
    run_click(command)
