"""`microvlm-score`: scores a checkpoint or bundle on the test vendor's drawings, next to baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from microvlm.bench.report_flags import ReportOutput, report_flags
from microvlm.console import note, run_click


@click.command()
@click.argument("model", default="nano")
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Folder that `microvlm-data emoji` wrote."
)
@click.option(
    "--against",
    default=None,
    help="A second checkpoint; also give the paired difference, MODEL minus this one.",
)
@click.option("--backend", default="torch", show_default=True, help="Backend that runs the model.")
@click.option("--baselines/--no-baselines", default=True, help="Also score nearest class means (minutes).")
@report_flags
def command(
    model: str, data: Path, against: str | None, backend: str, baselines: bool, output: ReportOutput
) -> None:
    """Score MODEL (a checkpoint, a bundle or 'nano').

    Captions of the fixed test emoji, scene questions on held-out pairs, episodes.
    """
    from microvlm.training.emoji.data.baselines import run_baselines
    from microvlm.training.emoji.data.emoji import load_emoji
    from microvlm.training.emoji.evaluate import paired_difference, score_model

    emoji = load_emoji(data)
    document: dict[str, Any] = {"report": "score", "model": model, "backend": backend}
    document |= score_model(model, emoji, backend, note)
    if against is not None:
        other = score_model(against, emoji, backend, note)
        difference = paired_difference(document["captions"]["correct"], other["captions"]["correct"])
        document["against"] = {"model": against, **other, "caption_difference": difference}
    if baselines:
        document["baselines"] = run_baselines(emoji)
    output.deliver(document)


def main() -> None:
    run_click(command)
