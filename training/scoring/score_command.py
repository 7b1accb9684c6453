"""`microvlm-score`: scores a checkpoint or bundle on held-out pictures, next to baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from microvlm.bench.report_flags import ReportOutput, report_flags
from microvlm.console import note, run_click
from microvlm.sources.model_source import BUNDLED_HELP, DEFAULT_MODEL
from microvlm.terminal.step_progress import step
from microvlm.terminal.suggestions import BACKEND, DEVICE, MODEL
from microvlm.training.data.caption_data import SPLITS
from microvlm.training.scoring.registry import PARTS, ScoreRequest

_PATH = click.Path(path_type=Path)


@click.command(epilog=BUNDLED_HELP)
@click.argument("model", type=MODEL, default=DEFAULT_MODEL)
@click.option(
    "--data",
    type=_PATH,
    required=True,
    help="Folder that `microvlm-data images` or `emoji` wrote, or a file of texts.",
)
@click.option(
    "--scores",
    type=click.Choice(["emoji", "captions", "answers", "texts"]),
    help="Which scores; by default the data's own. answers: confidence, what is declined; texts: KL from --against.",
)
@click.option("--split", type=click.Choice([*SPLITS, "all"]), help="Split of the data.  [default: test]")
@click.option("--count", type=click.IntRange(1), help="Samples of the split.  [default: at most 1000]")
@click.option(
    "--against",
    type=MODEL,
    help="A second checkpoint or bundle; also give the paired differences, MODEL minus this one.",
)
@click.option(
    "--beside",
    type=MODEL,
    multiple=True,
    metavar="MODEL",
    help="With texts: a further checkpoint or bundle for the same table; may be repeated.",
)
@click.option(
    "--backend", type=BACKEND, default="torch", show_default=True, help="Backend that runs the model."
)
@click.option("--device", type=DEVICE, help="Device of the backend torch, such as cuda.")
@click.option(
    "--baselines/--no-baselines",
    default=True,
    help="Also score what words alone give, and shuffled pictures; of emoji, nearest class means (minutes).",
)
@click.option("--text", type=_PATH, help="Plain text; also give the decoder's perplexity on it.")
@click.option(
    "--pictures", type=_PATH, help="Draw 20 held-out pictures with their captions: FILE.png or a folder."
)
@click.option(
    "--only",
    "parts",
    type=click.Choice(PARTS),
    multiple=True,
    help="Leave out all other scores of captioned pictures; may be repeated.",
)
@click.option(
    "--question",
    default=ScoreRequest.question,
    show_default=True,
    help="What is asked about labelled pictures.",
)
@click.option("--template", is_flag=True, help="Also score the objects' words in a template.")
@click.option(
    "--decoder",
    type=_PATH,
    help="A GGUF file, such as SmolLM2's: also score what it writes from the objects' words, with four examples.",
)
@click.option(
    "--words",
    type=_PATH,
    help="What a detector saw, for both: JSON lines of key and words.  [default: the annotated objects]",
)
@click.option(
    "--fit-answers",
    is_flag=True,
    help="Calibrate the answers of MODEL, a checkpoint's folder, on the split validation; writes its config.json.",
)
@click.option("--plots", type=_PATH, help="Draw the curves of the scores answers into this folder (SVG).")
@report_flags
def command(scores: str | None, plots: Path | None, output: ReportOutput, **options: Any) -> None:
    """Score MODEL (a checkpoint or a bundle) as users run it: greedy answers about held-out pictures.

    Captions against people's and against annotated objects, names of labelled pictures, questions by kind, episodes
    with and without the memory, and the caption loss. An emoji folder has scores of its own: test emoji, scene
    questions on held-out pairs, episodes.

    \b
    Example: microvlm-score photo --data data/mine --count 200 --pictures captions.png
    """
    from microvlm.training.scoring.registry import score

    document = score(ScoreRequest(**options), scores, step)
    output.deliver(document)
    if plots is not None:
        from microvlm.bench.scores.answer_plots import write_plots

        for path in write_plots(document, plots):
            note(f"{path} drawn")


def whole_command() -> click.Command:
    """The command of the console script."""
    return command


def main() -> None:
    run_click(whole_command())
