"""The report of `microvlm-score` on texts as a table. Scores nothing."""

from __future__ import annotations

from microvlm.bench.scores.caption_records import Estimate
from microvlm.bench.scores.text_records import TextReport
from microvlm.bench.tables import Report, Table


def report(document: TextReport) -> Report:
    names = {
        "model": document.model,
        "rounding": f"{document.teacher}, its weights rounded to 1.58 bits",
        "unigram": "unigram of the training texts",
        "uniform": "uniform",
        "teacher": f"{document.teacher}, the teacher",
    }
    rows = [
        ["", "KL from the teacher, nats a token", "same likeliest token", "cross-entropy, nats", "perplexity"]
    ]
    for row in document.rows:
        cells = [cell(row.kl), cell(row.top1), cell(row.nats), f"{row.perplexity:,.1f}"]
        rows.append([names.get(row.name, row.name), *cells])
    data = document.data
    remark = (
        f"{data.texts:,} texts, {data.tokens:,} tokens, of {data.name} ({data.split}); 95 % bootstrap intervals over "
        "texts in brackets"
    )
    return Report(
        f"how far {document.model} is from {document.teacher}",
        [Table("texts", "held-out texts", rows)],
        [remark],
    )


def cell(estimate: Estimate) -> str:
    """`0.752 [0.721, 0.782]`."""
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
