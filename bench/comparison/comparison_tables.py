"""Reports of `microvlm-bench compare` as tables. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

from microvlm.bench.comparison.comparison_records import (
    ComparedSide,
    ComparisonReport,
    Outlying,
    Quantity,
    Trial,
    TrialsReport,
)
from microvlm.bench.tables import Report, Rows, Table


def report(document: ComparisonReport) -> Report:
    head = f"{document.sentence} (A: {_side(document.a)}; B: {_side(document.b)})"
    remarks = [quantity.sentence for quantity in document.quantities]
    if document.in_turns:
        remarks.append(
            f"{document.pairs} pairs of fresh processes, {document.rounds} rounds in turns in each; intervals hold "
            f"together with {100 * document.level:g} % confidence; a difference counts from "
            f"{100 * document.margin:g} % on; no sample was left out"
        )
    remarks += [*document.remarks, *([document.energy_note] if document.energy_note else [])]
    return Report(head, [Table("comparison", "B against A", _rows(document.quantities))], remarks)


def trials_report(document: TrialsReport) -> Report:
    """How often `compare` was right where the truth is known."""
    rows = [["one kernel slower by", "trials", "flagged", "right", "kernel, B / A", "largest of a phase"]]
    for slowed in (True, False):
        trials = [trial for trial in document.trials if trial.slowed == slowed]
        if trials:
            rows.append(_trials_row(f"{100 * document.slowdown:g} %" if slowed else "nothing", trials))
    wrong = sum(not trial.right for trial in document.trials)
    head = (
        f"{wrong} of {len(document.trials)} trials wrong; at most {document.most_wrong} of each kind may be"
    )
    remark = (
        f"each trial is one `compare` of {document.pairs} pairs and {document.rounds} rounds; after every call the "
        f"slowed copy waits a share of the time that '{document.kernel}' took"
    )
    return Report(head, [Table("trials", "compare where the truth is known", rows)], [remark])


def _trials_row(label: str, trials: Sequence[Trial]) -> list[str]:
    ratios = [trial.kernel_ratio for trial in trials]
    return [
        label,
        str(len(trials)),
        str(sum(bool(trial.flagged) for trial in trials)),
        str(sum(trial.right for trial in trials)),
        f"{min(ratios):.3f}-{max(ratios):.3f}",
        f"{100 * max(trial.largest_elsewhere for trial in trials):.1f} %",
    ]


def _side(side: ComparedSide) -> str:
    extra = f", library {side.library}" if side.library else ""
    extra += ", another environment" if side.other_python else ""
    return f"{side.model} on {side.backend}{extra}"


def _rows(quantities: Sequence[Quantity]) -> Rows:
    rows = [["", "A", "B", "B / A", "verdict", "of the ceiling, A", "B", "outliers, A", "B"]]
    for quantity in quantities:
        rows.append(
            [
                quantity.name,
                *(f"{median:.4g} {quantity.unit}" for median in quantity.medians),
                f"{quantity.value:.3f} [{quantity.low:.3f}, {quantity.high:.3f}]",
                quantity.verdict,
                *("-" if share is None else f"{100 * share:.1f} %" for share in quantity.shares_of_ceiling),
                *(_outlying(side, quantity.unit) for side in quantity.outliers),
            ]
        )
    return rows


def _outlying(side: Outlying, unit: str) -> str:
    if not side.count:
        return f"0 of {side.samples}"
    return f"{side.count} of {side.samples}, up to {side.largest_ms:.3g} {unit}"
