"""The commands `microvlm-bench gate` and `history`."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from microvlm.bench.report_flags import ReportOutput, report_flags
from microvlm.console import GATE_FAILED, echo, note, print_json

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("file", type=_FILE)
@click.argument("document", required=False, type=_FILE)
@report_flags(stored=False)
def gate(file: Path, document: Path | None, output: ReportOutput) -> int:
    """Hold the limits in FILE (TOML or JSON) against DOCUMENT, or against the documents that it names.

    Status 1 when a limit is broken, with a line for each. DOCUMENT is a saved document or a store (.jsonl), of which
    the newest result counts. A limit has a metric and any of min, max, min_ratio and max_ratio (of a baseline), one_of:

    \b
      baseline = "run-last.json"
      [[limits]]
      metric = "results[label=ort].phases.decode.median_ms"
      max_ratio = 1.05

    \b
    Example: microvlm-bench gate limits.toml run.json
    """
    from microvlm.bench.gates.gate_check import check_gate

    checked = check_gate(file, document)
    output.deliver(checked)
    for limit in checked["limits"]:
        if not limit["met"]:
            note(limit["sentence"])
    return 0 if checked["met"] else GATE_FAILED


@click.command()
@click.argument("store", type=_FILE)
@click.option("--kind", help="Results of this kind alone, such as run.")
@click.option("--metric", "metrics", multiple=True, help="A figure to show beside; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON list.")
def history(store: Path, kind: str | None, metrics: tuple[str, ...], as_json: bool) -> None:
    """List the results in STORE, oldest first: when, of which commit (+ with changes), what, where.

    \b
    Example: microvlm-bench history results.jsonl --metric "results[label=ort].phases.decode.median_ms"
    """
    from microvlm.bench.gates import gate_tables
    from microvlm.bench.gates.metric_path import parse_path
    from microvlm.bench.gates.result_store import read_store
    from microvlm.bench.tables import padded
    from microvlm.escaping import printable

    for metric in metrics:
        parse_path(metric)
    results = [result for result in read_store(store) if kind is None or result.kind == kind]
    if as_json:
        print_json([msgspec.to_builtins(result) for result in results])
        return
    rows = gate_tables.history(results, metrics)
    echo(padded([[printable(cell) for cell in row] for row in rows]))
