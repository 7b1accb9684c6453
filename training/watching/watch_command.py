"""`microvlm-train watch`: shows a run, while it goes on or after it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from microvlm.console import GATE_FAILED, after_saving, echo, print_json
from microvlm.errors import UserError

PAGE = "watch.html"


@click.command("watch")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--follow", is_flag=True, help="Write the page again and again until the run ends.")
@click.option(
    "--every",
    type=click.IntRange(1, 3600),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="With --follow: seconds between two pages.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help=f"The page's file; RUN/{PAGE} if left out."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(run: Path, follow: bool, every: int, output: Path | None, as_json: bool) -> int:
    """Show RUN, a folder of microvlm-train: writes one HTML page with its curves, heatmaps and captions.

    The page needs no network and no other file. With --follow the exit status is 1 if the run failed or was stopped.

    \b
    Example: microvlm-train watch runs/mine --follow
    """
    from microvlm.atomic import write_file
    from microvlm.training.watching.run_reader import read_run, summary
    from microvlm.training.watching.watch_page import page

    target = output or run / PAGE
    if target.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {target} is no .html file; give a name that ends in .html.")
    shown: list[str] = []
    while True:
        view = read_run(run)
        going_on = follow and view.state in ("running", "new")
        write_file(target, page(view, every if going_on else None))
        lines = summary(view)
        if not as_json and lines != shown:
            echo("\n".join(lines))
            if not shown:
                echo(f"page: {target}")
        shown = lines
        if not going_on:
            break
        time.sleep(every)
    if as_json:
        with after_saving():
            print_json(document(view, target))
    return GATE_FAILED if follow and view.state != "finished" else 0


def document(view: Any, target: Path) -> dict[str, Any]:
    """The JSON document about a `RunView`: state, place, last values, last evaluation, files."""
    from microvlm.training.watching.run_reader import numbers

    status = view.status
    last: dict[str, float] = {}
    for row in view.rows:
        last |= numbers(row)
    return {
        "run": str(view.folder),
        "name": view.name,
        "state": view.state,
        "reason": view.reason,
        "stage": status.stage,
        "stage_step": status.stage_step,
        "stage_steps": status.stage_steps,
        "step": status.step,
        "steps": status.steps,
        "seconds_left": view.seconds_left,
        "metrics": last,
        "evaluation": view.evaluations[-1] if view.evaluations else None,
        "checkpoints": [str(path) for path in view.checkpoints],
        "page": str(target),
    }
