"""`microvlm-train leaderboard`: shows a leaderboard file."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from microvlm.bench.report_flags import ReportOutput, report_flags
from microvlm.errors import UserError


@click.command("leaderboard")
@click.argument("file", type=click.Path(path_type=Path))
@report_flags
def command(file: Path, output: ReportOutput) -> None:
    """Show FILE, to which `microvlm-train RECIPE --until NAME=VALUE --leaderboard FILE` adds runs; the fastest first.

    \b
    Example: microvlm-train leaderboard runs/leaderboard.jsonl
    """
    from microvlm.training.time_to_score.leaderboard import read_leaderboard

    try:
        entries = read_leaderboard(file)
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist: microvlm-train RECIPE --until NAME=VALUE --leaderboard {file} adds a run."
        ) from None
    output.deliver({"report": "leaderboard", "entries": msgspec.to_builtins(entries)})
