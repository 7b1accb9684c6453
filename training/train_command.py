"""`microvlm-train`: trains a checkpoint by a recipe on data folders; resumes a run that was stopped; watches a run."""

from __future__ import annotations

import multiprocessing
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import msgspec
from click.shell_completion import CompletionItem

from microvlm.bench.report_flags import ReportOutput, report_flags
from microvlm.commands.options import ITS_FLOATS, ThreadCount
from microvlm.console import BAD_INPUT, GATE_FAILED, after_saving, echo, note, print_json, run_click
from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.sources.model_source import BUNDLED
from microvlm.terminal.suggestions import FOLDER, MODEL, PRESET, Suggested

DEFAULT_RECIPE = "nano"
RUNS = Path("runs")


def _recipe_names() -> list[str]:
    from microvlm.training.recipe import packaged_recipes

    return packaged_recipes()


RECIPE = Suggested("recipe", _recipe_names, "file")


@click.command(name="train")
@click.argument("recipe", type=RECIPE, default=DEFAULT_RECIPE)
@click.option(
    "--data",
    "sources",
    type=FOLDER,
    multiple=True,
    metavar="FOLDER[=WEIGHT]",
    help="Data folder that `microvlm-data images` (or `emoji`) wrote; several are mixed by weight.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder of the run; an unfinished run in it resumes. By default a new one in runs/.",
)
@click.option(
    "--start",
    type=MODEL,
    default=None,
    help=f"The checkpoint to train (folder, hub id or {' or '.join(BUNDLED)}): what `microvlm assemble` or another run "
    "wrote.",
)
@click.option(
    "--decoder-from",
    type=MODEL,
    default=None,
    metavar="CHECKPOINT",
    help="Begin with this checkpoint's decoder, as distill-texts made it; a teacher is still --start.",
)
@click.option("--budget", default=None, metavar="STEPS|TIME", help="Length of the run: 300, 90s, 8m, 1.5h.")
@click.option("--batch-size", type=click.IntRange(1, 65_536), default=None, help="Samples of a batch.")
@click.option(
    "--until",
    default=None,
    metavar="NAME=VALUE",
    help="Stop when an evaluation of the last stage reaches this score, as in loss=2.5; status 1 if none does.",
)
@click.option(
    "--score-every", type=click.IntRange(1, 10_000_000), default=None, help="Steps between two evaluations."
)
@click.option(
    "--leaderboard",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    metavar="FILE",
    help="With --until: add the run to this file if it reaches the score.",
)
@click.option(
    "--price-per-hour",
    type=click.FloatRange(0, 1e6, min_open=True),
    default=None,
    help="With --until: of the machine, for the cost to the score.",
)
@click.option("--learning-rate", type=click.FloatRange(0, 10, min_open=True), default=None, help="Peak rate.")
@click.option("--seed", type=click.IntRange(0, 500_000_000), default=None, help="Of batches and new weights.")
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    default=None,
    help="A text file: how well the decoder alone predicts it is measured before, during and after.",
)
@click.option(
    "--track",
    "trackers",
    multiple=True,
    metavar="TRACKER",
    help="tensorboard, wandb or trackio beside metrics.jsonl; none turns all off (the default).",
)
@click.option(
    "--base-bits",
    type=click.Choice(["4", "32"]),
    default="32",
    show_default=True,
    help="Width of the frozen decoder in memory; 4 needs bitsandbytes.",
)
@click.option("--threads", type=ThreadCount(never_auto=ITS_FLOATS), default=None, help="CPU threads.")
@click.option(
    "--workers",
    type=ThreadCount(zero=True, never_auto="nothing is measured that workers speed up"),
    default=0,
    show_default=True,
    help="Processes that draw batches ahead, for a GPU that would wait for one (Linux).",
)
@click.option(
    "--stop-after", type=click.IntRange(min=1), default=None, help="Save and stop after this many steps."
)
@click.option(
    "--start-stage", default=None, help="The first stage of a preset's recipe to run; needs --start."
)
@click.option(
    "--fresh",
    multiple=True,
    metavar="PART",
    help="A part of the model (scope, ...) to initialise anew instead of taking it from --start.",
)
@click.option(
    "--float-control",
    is_flag=True,
    help="Train the same recipe with float32 weights, to measure the cost of ternary ones.",
)
@click.option("--print-recipe", is_flag=True, help="Print the recipe as JSON, to change it, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(recipe: str, **options: Any) -> int:
    """Train RECIPE: a JSON file or a packaged name (test, stage1, stage2, distill, distill-texts, small, small-distill,
    photo, photo-further, photo-facts, photo-colours, photo-words, nano).

    test learns a small model of your pictures from nothing, or tries --start briefly; stage1 and stage2 train an
    assembled model; distill makes it ternary. `microvlm-train watch RUN` shows a run,
    `microvlm-train test --help` lists all options.

    \b
    Example: microvlm-train test --data data/mine -o runs/mine
    """
    try:
        return train_recipe(recipe, **options)
    except UserError:
        # Of processes that train together, the main one says what is wrong with the command.
        if int(os.environ.get("RANK", "0")) == 0:
            raise
        sys.exit(BAD_INPUT)


def train_recipe(
    recipe: str,
    sources: tuple[str, ...],
    output: Path | None,
    start: str | None,
    decoder_from: str | None,
    budget: str | None,
    batch_size: int | None,
    until: str | None,
    score_every: int | None,
    leaderboard: Path | None,
    price_per_hour: float | None,
    learning_rate: float | None,
    seed: int | None,
    text: Path | None,
    trackers: tuple[str, ...],
    base_bits: str,
    threads: int | None,
    workers: int,
    stop_after: int | None,
    start_stage: str | None,
    fresh: tuple[str, ...],
    float_control: bool,
    print_recipe: bool,
    as_json: bool,
) -> int:
    """What the command does; see its options. Returns its exit status."""
    from microvlm.training.budget import parse_budget
    from microvlm.training.recipe import load_recipe
    from microvlm.training.time_to_score.goal import parse_goal

    if recipe == "test" and start is not None and start_stage is None:
        recipe = "test-start"
    loaded = _changed(load_recipe(recipe), batch_size, learning_rate, seed, score_every)
    if print_recipe:
        echo(msgspec.json.format(msgspec.json.encode(loaded), indent=2).decode())
        return 0
    length = None if budget is None else parse_budget(budget)
    goal = parse_goal(until, leaderboard, price_per_hour)
    folders = [_data_folder(source) for source in sources]
    if not folders:
        raise UserError("--data is missing: give a folder that microvlm-data images SOURCE -o FOLDER wrote.")
    for folder in folders:
        # Before torch is imported, which takes seconds.
        if not folder.path.exists():
            raise UserError(
                f"{folder.path} does not exist; make it with microvlm-data images SOURCE -o {folder.path}."
            )
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        raise UserError("--workers needs a system that can fork: leave it out here.")
    from microvlm.training.watching.tracking import check_trackers

    check_trackers(trackers)
    import torch

    from microvlm.backends.threads import pool_threads
    from microvlm.training.frozen_base import check_base_bits
    from microvlm.training.loop.processes import Processes
    from microvlm.training.trainer import CHECKPOINT, open_data, train
    from microvlm.training.watching.run_name import next_run_name

    bits = int(base_bits)
    check_base_bits(bits)
    if threads is not None:
        torch.set_num_threads(pool_threads(threads))
    processes = Processes.join()
    out = output or processes.share(RUNS / next_run_name(RUNS, loaded.name, datetime.now()))
    complete = train(
        loaded,
        open_data(loaded, folders),
        out,
        note,
        float_control,
        stop_after,
        start,
        start_stage,
        fresh,
        workers,
        budget=length,
        trackers=trackers,
        text=text,
        base_bits=bits,
        until=None if goal is None else goal.target,
        decoder_from=decoder_from,
    )
    processes.leave()
    if not processes.is_main:
        return 0
    checkpoint = out / CHECKPOINT
    outcome = goal.finish(out) if goal is not None and complete else None
    with after_saving():
        if as_json:
            document = {"output": str(out), "recipe": loaded.name, "complete": complete}
            print_json(document if outcome is None else document | {"outcome": msgspec.to_builtins(outcome)})
        elif complete:
            if goal is not None and outcome is not None:
                echo("\n".join(goal.lines(outcome)))
            echo(f"{checkpoint}: trained. Next: microvlm-score {checkpoint} --data {folders[0].path}")
            echo(
                f"or microvlm caption PICTURE --model {checkpoint}, or microvlm-export {checkpoint} --bits 1.58"
            )
    return 0 if outcome is None or outcome.score.reached else GATE_FAILED


def _changed(
    recipe: Any,
    batch_size: int | None,
    learning_rate: float | None,
    seed: int | None,
    score_every: int | None,
) -> Any:
    """The recipe with the command line's changes. The rates of its stages keep their proportion to the first one's."""
    stages = recipe.stages
    if batch_size is not None:
        stages = tuple(msgspec.structs.replace(stage, batch_size=batch_size) for stage in stages)
    if learning_rate is not None:
        factor = learning_rate / stages[0].learning_rate
        stages = tuple(
            msgspec.structs.replace(stage, learning_rate=factor * stage.learning_rate) for stage in stages
        )
    changes = {"stages": stages} | ({"seed": seed} if seed is not None else {})
    changes |= {"evaluate_every": score_every} if score_every is not None else {}
    return msgspec.structs.replace(recipe, **changes)


def _data_folder(source: str) -> Any:
    """`FOLDER` or `FOLDER=WEIGHT`. Raises UserError for a weight that is no number above 0."""
    from microvlm.training.stages.task import DataFolder

    folder, equals, weight = source.rpartition("=")
    if not equals or Path(source).exists():
        return DataFolder(Path(source))
    try:
        number = float(weight)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(f"--data {quote(source)}: its weight must be a number above 0, as in {folder}=2.")
    return DataFolder(Path(folder), number)


@click.command(name="costs")
@click.option(
    "--model", type=PRESET, default="full", show_default=True, help="A preset, or a checkpoint's folder."
)
@click.option(
    "--samples", type=click.IntRange(1), default=10_000, show_default=True, help="Training pictures."
)
@click.option("--machine", default="rtx3090", show_default=True, help="A machine of the table.")
@report_flags
def costs(model: str, samples: int, machine: str, output: ReportOutput) -> None:
    """Predict what stage1, stage2 and distill cost on a GPU. Nothing is measured.

    \b
    Example: microvlm-train costs --model full --samples 10000
    """
    from microvlm.config import MicroVLMConfig
    from microvlm.presets import preset, preset_names
    from microvlm.sources.model_source import find_model
    from microvlm.training.predicted_costs import MACHINES, predict_costs
    from microvlm.training.recipe import load_recipe

    if machine not in MACHINES:
        raise UserError(f"unknown machine {quote(machine)}; choose one of {', '.join(MACHINES)}.")
    config = preset(model) if model in preset_names() else MicroVLMConfig.load(find_model(model).folder)
    recipes = [
        predict_costs(load_recipe(name), config, samples, MACHINES[machine])
        for name in ("stage1", "stage2", "distill")
    ]
    output.deliver({"report": "training_costs", "recipes": recipes})


class RecipeGroup(click.Group):
    """Commands by name; any other first argument is a recipe for `train`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_completion = ctx.resilient_parsing and not args  # of the first word, which may be a command's name
        if not is_completion and (
            not args or (args[0] not in self.commands and args[0] not in ("--help", "-h"))
        ):
            args = ["train", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The first word: a command, a recipe, or an option of `train`."""
        train = self.commands["train"]
        if incomplete.startswith("-"):
            return train.shell_complete(click.Context(train, parent=ctx, resilient_parsing=True), incomplete)
        recipes = RECIPE.shell_complete(ctx, train.params[0], incomplete)
        return [*super().shell_complete(ctx, incomplete), *recipes]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] in self.commands:
            return super().resolve_command(ctx, args)
        return args[0], self.commands["train"], args


@click.group(cls=RecipeGroup, help=command.help, invoke_without_command=False)
def cli() -> None:
    pass


cli.add_command(command)
cli.add_command(costs)


def whole_command() -> click.Group:
    """The group with all its commands."""
    from microvlm.training.ternary_designs.comparison_command import command as designs
    from microvlm.training.time_to_score.leaderboard_command import command as leaderboard
    from microvlm.training.watching.watch_command import command as watch

    cli.add_command(designs, "designs")
    cli.add_command(leaderboard, "leaderboard")
    cli.add_command(watch, "watch")
    return cli


def main() -> None:
    run_click(whole_command())
