"""The records of a report of `microvlm-score --scores answers`: confidence, declined answers, risk and coverage."""

from __future__ import annotations

import msgspec

from microvlm.bench.records import Figure, Provenance
from microvlm.bench.scores.caption_records import Estimate, ScoredData
from microvlm.formats.documents import Count


class KnownRow(msgspec.Struct, frozen=True):
    """Things that have a right answer: what was said, as shares of all; `right_declined` is of what would be right."""

    kind: str
    count: Count
    right: Estimate
    wrong: Estimate
    declined: Estimate
    right_declined: Estimate | None = None


class StrangerRow(msgspec.Struct, frozen=True):
    """Things that should be declined; `own_words`: the share that the model's own words decline."""

    kind: str
    count: Count
    declined: Estimate
    own_words: Figure
    auroc: Figure | None = None


class CalibrationBin(msgspec.Struct, frozen=True):
    """Answers of neighbouring confidence."""

    count: Count
    confidence: Figure
    right: Figure


class Calibration(msgspec.Struct, frozen=True):
    """The calibration error over bins of equal mass."""

    error: Estimate
    bins: list[CalibrationBin]


class CurvePoint(Estimate, frozen=True, kw_only=True):
    """The risk at one coverage."""

    coverage: Figure


class RiskCoverage(msgspec.Struct, frozen=True):
    """The share wrong of the surest answers, over their share."""

    area: Estimate
    curve: list[CurvePoint]


class AnswerReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document."""

    model: str
    backend: str
    data: ScoredData
    provenance: Provenance
    fitted: bool
    """Whether the calibration was fitted on these very answers."""
    threshold: Figure | None = None
    points: list[Figure] = []
    values: list[Figure] = []
    known: list[KnownRow]
    strangers: list[StrangerRow]
    calibration: Calibration | None = None
    risk_coverage: RiskCoverage | None = None
    auroc: Figure | None = None
