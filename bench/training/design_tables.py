"""A comparison of designs of ternary layers as a table."""

from __future__ import annotations

from microvlm.bench.scores.text_tables import cell
from microvlm.bench.tables import Report, Table
from microvlm.bench.training.design_records import DesignReport


def report(document: DesignReport) -> Report:
    training = document.training
    rows = [
        [
            "design",
            "bits a weight",
            "KL after rounding, nats a token",
            f"KL after {training.steps} steps",
            "same likeliest token",
            "seconds a step",
        ]
    ]
    rows += [
        [
            row.description,
            f"{row.bits_per_weight:.3f}",
            cell(row.rounded.kl),
            cell(row.trained.kl),
            cell(row.trained.top1),
            f"{row.step_seconds:.1f}",
        ]
        for row in document.rows
    ]
    names = ", ".join(data.name for data in document.data)
    remarks = [
        f"{training.batch_size} texts a step, {training.tokens:,} tokens in all, learning rate "
        f"{training.learning_rate:g}, seed {training.seed}; {document.texts} held-out texts of {names}; 95 % bootstrap "
        "intervals over texts in brackets"
    ]
    return Report(
        f"ternary designs of {document.start}", [Table("designs", "designs of ternary layers", rows)], remarks
    )
