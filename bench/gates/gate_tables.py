"""The report of `microvlm-bench gate`, and a store's history, as tables. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from microvlm.bench.gates.gate_records import CheckedLimit, GateReport
from microvlm.bench.gates.metric_path import MissingMetric, look_up
from microvlm.bench.gates.result_store import StoredResult
from microvlm.bench.tables import Report, Rows, Table


def report(document: GateReport) -> Report:
    broken = [limit for limit in document.limits if not limit.met]
    head = f"{len(document.limits) - len(broken)} of {len(document.limits)} limits of {document.gate} hold"
    rows = [["document", "metric", "value", "demanded", "met"], *map(_row, document.limits)]
    return Report(head, [Table("limits", "limits", rows)], [limit.sentence for limit in broken])


def history(results: Sequence[StoredResult], metrics: Sequence[str]) -> Rows:
    """A row a result, oldest first: when, of which commit, of what, where; then each metric. Raises UserError."""
    rows = [["measured", "commit", "kind", "model", "machine", *metrics]]
    for result in results:
        facts = result.measured.provenance
        commit = facts.commit
        name = "-" if commit is None else commit.hash[:10] + ("+" if commit.changed else "")
        rows.append(
            [
                facts.date_utc[:19],
                name,
                result.kind,
                _model(result.document),
                facts.cpu,
                *(_figure(result.document, metric) for metric in metrics),
            ]
        )
    return rows


def _row(limit: CheckedLimit) -> list[str]:
    value = limit.value
    shown = "-" if value is None else value if isinstance(value, str) else f"{value:.6g}"
    return [limit.document, limit.metric, shown, limit.demanded, "yes" if limit.met else "NO"]


def _model(document: Any) -> str:
    for path in ("provenance.models[0].name", "provenance.model.name"):
        try:
            return str(look_up(document, path))
        except MissingMetric:
            continue
    return "-"


def _figure(document: Any, metric: str) -> str:
    try:
        value = look_up(document, metric)
    except MissingMetric:
        return "-"
    return f"{value:.6g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
