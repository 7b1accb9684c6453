"""`microvlm-train designs`: compares designs of ternary layers."""

from __future__ import annotations

from pathlib import Path

import click

from microvlm.bench.report_flags import ReportOutput, report_flags
from microvlm.bench.training.ternary_design import DESIGNS
from microvlm.commands.options import ITS_FLOATS, ThreadCount, WholeNumber
from microvlm.console import note
from microvlm.terminal.step_progress import waiting
from microvlm.terminal.suggestions import MODEL


@click.command("designs")
@click.option(
    "--start", type=MODEL, required=True, help="The float model: a checkpoint's folder or a hub id."
)
@click.option(
    "--data",
    "sources",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="A file of texts; may be repeated.",
)
@click.option(
    "--design",
    "designs",
    type=click.Choice(list(DESIGNS)),
    multiple=True,
    help="One of the designs; may be repeated. All by default.",
)
@click.option(
    "--steps", type=WholeNumber(1, 1_000_000), default=40, show_default=True, help="Of each design."
)
@click.option(
    "--batch-size", type=WholeNumber(1, 65_536), default=64, show_default=True, help="Texts a step."
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, 10, min_open=True),
    default=1e-3,
    show_default=True,
    help="Peak rate.",
)
@click.option("--count", type=WholeNumber(1), default=128, show_default=True, help="Held-out texts.")
@click.option("--seed", type=WholeNumber(0, 500_000_000), default=0, show_default=True, help="Of batches.")
@click.option("--threads", type=ThreadCount(never_auto=ITS_FLOATS), help="CPU threads.")
@report_flags
def command(
    start: str,
    sources: tuple[Path, ...],
    designs: tuple[str, ...],
    steps: int,
    batch_size: int,
    learning_rate: float,
    count: int,
    seed: int,
    threads: int | None,
    output: ReportOutput,
) -> None:
    """Distil the decoder of --start for some steps in each design of ternary layers, on the same batches.

    Scales by matrix, row or group, rotations, without SubLN, without a teacher: KL divergence from the start after
    rounding and after training, on held-out texts.

    \b
    Example: microvlm-train designs --start start --data captions.jsonl --steps 40
    """
    import torch

    from microvlm.backends.threads import pool_threads
    from microvlm.training.ternary_designs.comparison import ComparisonPlan, compare

    if threads is not None:
        torch.set_num_threads(pool_threads(threads))
    plan = ComparisonPlan(
        start,
        sources,
        tuple(dict.fromkeys(designs)) or tuple(DESIGNS),
        steps,
        batch_size,
        learning_rate,
        seed,
        count,
    )
    with waiting("training and scoring"):
        document = compare(plan, note)
    output.deliver(document)
