"""The command `microvlm-bench attention`."""

from __future__ import annotations

from pathlib import Path

import click

from microvlm.backends.threads import Threads
from microvlm.bench.report_flags import ReportOutput, report_flags
from microvlm.bench.threads_flag import number_of_threads, threads_option
from microvlm.commands.options import WholeNumber
from microvlm.console import after_saving, echo
from microvlm.sources.model_source import BUNDLED_HELP, DEFAULT_MODEL
from microvlm.terminal.step_progress import step
from microvlm.terminal.suggestions import BACKEND, MODEL

MOST_PICTURES, MOST_EXAMPLES = 10_000, 100


@click.command(epilog=BUNDLED_HELP)
@click.argument("model", type=MODEL, default=DEFAULT_MODEL)
@click.option(
    "--against",
    type=MODEL,
    help="Test the drift to this other model: a later checkpoint, or another precision.",
)
@click.option(
    "--backend", type=BACKEND, default="torch", show_default=True, help="Only torch gives attention weights."
)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    help="Folder of pictures, in place of the evaluation set's.",
)
@click.option(
    "--images",
    type=WholeNumber(1, MOST_PICTURES),
    default=60,
    show_default=True,
    help="Pictures, evenly spread over the folder or the set.",
)
@click.option(
    "--examples",
    type=WholeNumber(0, MOST_EXAMPLES),
    default=12,
    show_default=True,
    help="Pictures of the set whose answers are kept, with where each word looked; `report --html` shows them.",
)
@click.option("--prompt", help="A question; the model's own for captions by default.")
@threads_option
@click.option(
    "--seed", type=WholeNumber(0, 2**32), default=0, show_default=True, help="Of slices, draws and swaps."
)
@click.option(
    "--plots",
    type=click.Path(file_okay=False, path_type=Path),
    help="Draw heatmaps, text tokens x prefix embeddings, a PNG for each layer, into this folder.",
)
@report_flags
def attention(
    model: str,
    against: str | None,
    backend: str,
    pictures: Path | None,
    images: int,
    examples: int,
    prompt: str | None,
    threads: Threads,
    seed: int,
    plots: Path | None,
    output: ReportOutput,
) -> None:
    """Measure the attention of MODEL (a checkpoint or a bundle): entropy, sparsity, mean, max, and what it rests on.

    Tests whether alignment features and memory codes are spread evenly (the statistic of LeJEPA). --against tests
    whether another model, or the same at another precision, looks elsewhere in the same pictures.

    \b
    Example: microvlm-bench attention photo --images 20 --plots heatmaps
    """
    from microvlm.bench.attention.attention_bench import Options, run

    count = number_of_threads(threads, model, backend)
    options = Options(model, against, backend, pictures, images, prompt, count, seed, examples)
    measured = run(options, progress=step)
    output.deliver(measured.document)
    if plots is not None:
        from microvlm.bench.attention.attention_plots import write_plots

        paths = write_plots(measured, plots)
        with after_saving():
            if not output.as_json:
                echo(f"{len(paths)} heatmaps in {plots}")
