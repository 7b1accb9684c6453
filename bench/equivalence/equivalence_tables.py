"""The document of `microvlm-bench equivalence` as tables. Reads JSON, measures nothing."""

from __future__ import annotations

from typing import Any

from microvlm.bench.tables import Report, Table


def report(document: dict[str, Any]) -> Report:
    reference, candidate = document["reference"], document["candidate"]
    head = (
        f"{document['verdict']}: {candidate['model']} on {candidate['backend']} against "
        f"{reference['model']} on {reference['backend']} - {document['question']}"
    )
    rows = [["", "free-running", "replayed"], *_agreement_rows(document)]
    accuracy = [["answers right", "samples", "reference", "candidate"]]
    accuracy += [
        [kind, str(row["samples"]), f"{row['reference']:.3f}", f"{row['candidate']:.3f}"]
        for kind, row in document["accuracy"].items()
    ]
    remarks = list(document["reasons"])
    if document["replay"].get("unavailable"):
        remarks.append(document["replay"]["unavailable"])
    if "kernels" in candidate:
        remarks.append(
            f"quantised layers: reference {reference['kernels']}, candidate {candidate['kernels']}"
        )
    tables = [Table("agreement", "agreement", rows), Table("accuracy", "exact match", accuracy)]
    return Report(head, tables, remarks)


def _agreement_rows(document: dict[str, Any]) -> list[list[str]]:
    replay = document["replay"]
    samples = document["samples"]
    rows = [
        [
            f"greedy answers equal, of {samples}",
            _share(document["greedy_match"]),
            _share(replay["greedy_match"]),
        ],
        [
            "logits, largest difference",
            _small(document["logits_max_abs_diff"]),
            _small(replay["logits_max_abs_diff"]),
        ],
        [f"top-1 agreement, {document['positions']} positions", _share(document["top1_agreement"]), "-"],
        ["KL mean / p99 / max, nats", _kl(document), "-"],
        ["memory drift, 20 steps", _small(document["memory_drift"]), _small(replay.get("memory_drift"))],
    ]
    if replay["codes"] is not None:
        rows += [
            [
                "integer sums",
                "-",
                f"{replay['sums'] - replay['sums_differing']:,} of {replay['sums']:,} equal",
            ],
            ["int8 activations that differ", "-", f"{replay['codes_differing']:,} of {replay['codes']:,}"],
            ["largest step of an activation", "-", str(replay["max_code_step"])],
            ["largest distance from a tie", "-", _small(replay["max_tie_distance"])],
        ]
    return rows


def _kl(document: dict[str, Any]) -> str:
    return " / ".join(_small(document[name]) for name in ("kl_mean", "kl_p99", "kl_max"))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
