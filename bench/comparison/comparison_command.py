"""The command `microvlm-bench compare`."""

from __future__ import annotations

from pathlib import Path

import click

from microvlm.backends.threads import Threads
from microvlm.bench.report_flags import ReportOutput, report_flags
from microvlm.bench.threads_flag import number_of_threads, threads_option
from microvlm.commands.options import WholeNumber
from microvlm.console import note
from microvlm.errors import UserError
from microvlm.sources.model_source import BUNDLED_HELP
from microvlm.terminal.step_progress import step
from microvlm.terminal.suggestions import BACKEND, FILE, MODEL

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(epilog=BUNDLED_HELP)
@click.argument("a", type=MODEL)
@click.argument("b", type=MODEL)
@click.option("--backend", type=BACKEND, default="ort", show_default=True, help="Backend of both sides.")
@click.option("--backend-b", type=BACKEND, help="Another backend of B.")
@click.option("--library-a", type=_FILE, help="Native library of A instead of the package's.")
@click.option("--library-b", type=_FILE, help="Native library of B instead of the package's.")
@click.option("--python-a", type=FILE, help="Interpreter that runs A, with another commit's package.")
@click.option("--python-b", type=FILE, help="Interpreter that runs B.")
@click.option(
    "--pairs",
    type=WholeNumber(4),
    default=10,
    show_default=True,
    help="Pairs of fresh processes; 9 find a difference real.",
)
@click.option("--rounds", type=WholeNumber(2), default=16, show_default=True, help="Timed rounds in a pair.")
@threads_option
@click.option("--new-tokens", type=WholeNumber(1), default=16, show_default=True, help="Tokens of a decode.")
@click.option(
    "--margin", type=float, help="Smallest difference that counts, in percent: 2, and 5 for saved documents."
)
@report_flags
def compare(
    a: str,
    b: str,
    backend: str,
    backend_b: str | None,
    library_a: Path | None,
    library_b: Path | None,
    python_a: str | None,
    python_b: str | None,
    pairs: int,
    rounds: int,
    threads: Threads,
    new_tokens: int,
    margin: float | None,
    output: ReportOutput,
) -> None:
    """Say whether B differs from A in speed: bundles or checkpoints, or two saved documents of run (.json).

    Models run in turns, each pair in fresh processes; every phase and every native product is judged by a bootstrap
    interval. Of saved documents less can be said, because they were not made in turns.

    \b
    Example: microvlm-bench compare nano nano --library-b new/libmicrovlm_ops.so
    """
    if margin is not None and not 0 <= margin <= 1000:
        raise UserError(f"--margin is {margin:g}; give percent from 0 to 1000.")
    saved = [side.endswith(".json") for side in (a, b)]
    if any(saved):
        if not all(saved):
            raise UserError("one of A and B is a saved document: give two models, or two documents of run.")
        from microvlm.bench.comparison import saved_runs

        share = saved_runs.MARGIN if margin is None else margin / 100
        document = saved_runs.compare_saved(Path(a), Path(b), share)
    else:
        from microvlm.bench.comparison import comparison_bench, judgement

        document = comparison_bench.run(
            comparison_bench.SideOptions(a, backend, library_a, python_a),
            comparison_bench.SideOptions(b, backend_b or backend, library_b, python_b),
            comparison_bench.Options(
                number_of_threads(threads, a, backend),
                pairs,
                rounds,
                new_tokens,
                judgement.MARGIN if margin is None else margin / 100,
            ),
            progress=step,
        )
    output.deliver(document)
    note(document["sentence"])
