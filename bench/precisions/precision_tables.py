"""The report of `microvlm-bench precisions` as tables. Measures nothing."""

from __future__ import annotations

from microvlm.bench.precisions.precision_records import PrecisionReport, Width
from microvlm.bench.scores.caption_records import Estimate
from microvlm.bench.tables import Report, Table


def report(document: PrecisionReport) -> Report:
    """A table for each file of texts."""
    head = f"{document.model} at every width, against its float32 weights on PyTorch"
    tables = []
    for number, data in enumerate(document.data):
        rows = [
            ["weights, bits", "token table, bits", "KL, nats a token", "same likeliest token", "perplexity"]
        ]
        rows[0].append("predicted bundle, MB")
        for width in document.widths:
            cost = width.texts[number]
            rows.append(
                [
                    _name(width),
                    str(width.embedding_bits),
                    _estimate(cost.kl),
                    _estimate(cost.top1),
                    f"{cost.perplexity:.4g}",
                    f"{width.predicted_bundle_bytes / 1e6:.1f}",
                ]
            )
        title = f"{data.name}, {data.split}: {data.texts} texts, {data.tokens:,} tokens"
        tables.append(Table(f"texts{number + 1}", title, rows))
    return Report(head, tables, ["intervals: 95 %, bootstrap over texts"])


def _name(width: Width) -> str:
    fitted = f", fitted to {width.calibrated_on}" if width.calibrated_on else ""
    return f"{width.bits:g}{fitted}"


def _estimate(estimate: Estimate) -> str:
    digits = 4 if estimate.value < 0.1 else 3
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
