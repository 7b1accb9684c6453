"""`microvlm-bench pi`: the command line of this package."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import click

from microvlm.bench.report_flags import ReportOutput, report_flags
from microvlm.commands.options import WholeNumber
from microvlm.console import GATE_FAILED, note
from microvlm.errors import UserError
from microvlm.sources.model_source import BUNDLED_HELP, DEFAULT_MODEL
from microvlm.terminal.step_progress import step
from microvlm.terminal.suggestions import MODEL, TARGET

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(epilog=BUNDLED_HELP)
@click.argument("model", type=MODEL, default=DEFAULT_MODEL)
@click.option(
    "--target",
    type=TARGET,
    help="emulated[:CPU], local or ssh:USER@HOST[:PORT]; the default is what this machine has.",
)
@click.option(
    "--part", "parts", multiple=True, help="equivalence, fit, cost or peers; may be repeated. All by default."
)
@click.option("--profile", default="zero2w", show_default=True, help="zero2w, pi3, pi4, pi5 or a JSON file.")
@click.option(
    "--images",
    type=WholeNumber(1),
    default=2,
    show_default=True,
    help="Evaluation images of the equivalence.",
)
@click.option("--repeats", type=WholeNumber(1), default=5, show_default=True, help="Timed rounds on a board.")
@click.option(
    "--prompt-tokens", type=WholeNumber(1), default=15, show_default=True, help="Of text, after the image."
)
@click.option(
    "--answer-tokens", type=WholeNumber(1), default=50, show_default=True, help="Of the predicted answer."
)
@click.option(
    "--gate", is_flag=True, help="Compare the counts with the committed ones; status 1 on a change."
)
@click.option("--update-baseline", is_flag=True, help="Write the counts as the new baseline.")
@click.option("--baselines", type=click.Path(file_okay=False, path_type=Path), help="Folder of baselines.")
@click.option("--calibrate", type=_FILE, help="Measure this machine and write its profile to this file.")
@report_flags
def pi(
    model: str,
    calibrate: Path | None,
    output: ReportOutput,
    **options: Any,
) -> int:
    """Check and predict MODEL (a bundle, a checkpoint or 'full') on a Raspberry Pi.

    Emulated: equivalence with torch and ort, instructions counted by phase, times predicted for a board, peers by the
    same count. On a board: the same phases timed. Status 1 when the gate or the equivalence fails.

    \b
    Example: microvlm-bench pi photo --part cost --profile zero2w
    """
    from microvlm.bench.pi import profiles
    from microvlm.bench.pi.pi_bench import Options, run
    from microvlm.bench.pi.workload_phases import Scenario

    if calibrate is not None:
        return _calibrate(calibrate, profiles.load_profile(options["profile"]), model)
    if options["gate"] and options["update_baseline"]:
        raise UserError("--gate and --update-baseline exclude each other: give one.")
    scenario = Scenario(options.pop("prompt_tokens"), options.pop("answer_tokens"))
    if options["baselines"] is None:
        del options["baselines"]
    document, failures = run(Options(model=model, scenario=scenario, **options), step)
    output.deliver(document)
    for failure in failures:
        note(f"FAIL: {failure}")
    if failures and options["gate"]:
        remedy = f"bash .ci/nox -s pi -- {model} --part cost --update-baseline"
        note(f"a change that is meant: {remedy}, and commit the file")
    return GATE_FAILED if failures else 0


def _calibrate(path: Path, like: Any, model: str) -> int:
    if platform.machine() == "aarch64":
        # The counts that times are compared with are those of the plain NEON kernels.
        os.environ.setdefault("MICROVLM_KERNELS", "neon")
    from microvlm.bench.pi import calibrate

    calibrate.write(calibrate.calibrate(like, step, model=model), path)
    note(f"wrote {path}: give it as --profile")
    return 0
