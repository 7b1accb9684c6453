"""The report of `microvlm-score --scores answers` as tables. Scores nothing."""

from __future__ import annotations

from microvlm.bench.scores.answer_records import AnswerReport
from microvlm.bench.scores.caption_records import Estimate
from microvlm.bench.tables import Report, Table


def report(document: AnswerReport) -> Report:
    name = "/".join(document.model.replace("\\", "/").rstrip("/").split("/")[-2:])
    tables = []
    if document.known:
        rows = [["asked", "number", "right", "wrong", "declined", "of the right, declined"]]
        for row in document.known:
            outcomes = (row.right, row.wrong, row.declined, row.right_declined)
            rows.append([row.kind, str(row.count), *map(_cell, outcomes)])
        tables.append(Table("known", "things that have a right answer", rows))
    if document.strangers:
        rows = [["kind", "number", "declined", "in the model's own words", "AUROC against right answers"]]
        for stranger in document.strangers:
            area = "" if stranger.auroc is None else f"{stranger.auroc:.3f}"
            cells = [_cell(stranger.declined), f"{stranger.own_words:.3f}", area]
            rows.append([stranger.kind, str(stranger.count), *cells])
        tables.append(Table("strangers", "things that should be declined", rows))
    tables.append(Table("confidence", "is it right when it is sure?", _confidence(document)))
    if document.calibration is not None:
        rows = [["mean confidence", "answers", "right"]]
        for part in document.calibration.bins:
            rows.append([f"{part.confidence:.3f}", str(part.count), f"{part.right:.3f}"])
        tables.append(Table("calibration", "answers of neighbouring confidence", rows))
    if document.risk_coverage is not None:
        rows = [["answered", "wrong of the answered"]]
        rows += [[f"{point.coverage:.2f}", _cell(point)] for point in document.risk_coverage.curve]
        tables.append(Table("curve", "risk over coverage: the surest answers first", rows))
    data = document.data
    remarks = [
        f"{data.samples:,} of {data.available:,} samples of {data.name} ({data.split_words}), on {document.backend}; "
        "95 % intervals in brackets, Wilson's of shares, bootstrap of the rest"
    ]
    if document.fitted:
        remarks.append("map and threshold were fitted on these very answers: measure them on another split")
    if document.threshold is None:
        remarks.append("this model was never calibrated: it declines in its own words only")
    return Report(f"how sure {name} is", tables, remarks)


def _confidence(document: AnswerReport) -> list[list[str]]:
    rows = [["", "value"]]
    if document.threshold is not None:
        rows.append(["threshold of confidence", f"{document.threshold:.3f}"])
    if document.calibration is not None:
        bins = len(document.calibration.bins)
        rows.append([f"calibration error, {bins} bins of equal mass", _cell(document.calibration.error)])
    if document.risk_coverage is not None:
        rows.append(["area under risk over coverage", _cell(document.risk_coverage.area)])
    if document.auroc is not None:
        rows.append(["AUROC, right against wrong answers", f"{document.auroc:.3f}"])
    return rows


def _cell(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
