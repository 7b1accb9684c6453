"""The report of `microvlm-bench equivalence` as tables. Measures nothing."""

from __future__ import annotations

from microvlm.bench.equivalence.equivalence_records import EquivalenceReport
from microvlm.bench.tables import Report, Table


def report(document: EquivalenceReport) -> Report:
    reference, candidate = document.reference, document.candidate
    head = (
        f"{document.verdict}: {candidate.model} on {candidate.backend} against "
        f"{reference.model} on {reference.backend} - {document.question}"
    )
    rows = [["", "free-running", "replayed"], *_agreement_rows(document)]
    accuracy = [["answers right", "samples", "reference", "candidate"]]
    accuracy += [
        [kind, str(row.samples), f"{row.reference:.3f}", f"{row.candidate:.3f}"]
        for kind, row in document.accuracy.items()
    ]
    remarks = list(document.reasons)
    if document.starts_at.tie and not document.starts_at.layer:
        remarks.append(f"the first rounding tie is in {document.starts_at.tie}")
    if document.replay.unavailable:
        remarks.append(document.replay.unavailable)
    if candidate.kernels is not None:
        remarks.append(f"quantised layers: reference {reference.kernels}, candidate {candidate.kernels}")
    tables = [Table("agreement", "agreement", rows), Table("accuracy", "exact match", accuracy)]
    return Report(head, tables, remarks)


def _agreement_rows(document: EquivalenceReport) -> list[list[str]]:
    replay = document.replay
    kl = " / ".join(_small(value) for value in (document.kl_mean, document.kl_p99, document.kl_max))
    rows = [
        [
            f"greedy answers equal, of {document.samples}",
            _share(document.greedy_match),
            _share(replay.greedy_match),
        ],
        [
            "logits, largest difference",
            _small(document.logits_max_abs_diff),
            _small(replay.logits_max_abs_diff),
        ],
        [f"top-1 agreement, {document.positions} positions", _share(document.top1_agreement), "-"],
        ["KL mean / p99 / max, nats", kl, "-"],
        *_newer_rows(document),
        ["memory drift, 20 steps", _small(document.memory_drift), _small(replay.memory_drift)],
    ]
    if replay.codes is not None:
        rows += [
            ["integer sums", "-", f"{replay.sums_equal} equal"],
            ["int8 activations that differ", "-", replay.differing_codes],
            ["largest step of an activation", "-", str(replay.max_code_step)],
            ["largest distance from a tie", "-", _small(replay.max_tie_distance)],
        ]
    return rows


def _newer_rows(document: EquivalenceReport) -> list[list[str]]:
    """What documents of older versions do not hold."""
    if document.top5_agreement is None:
        return []
    return [
        ["top-5 tokens shared", _share(document.top5_agreement), "-"],
        ["RMS change of the likeliest token's probability", _small(document.probability_change_rms), "-"],
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
