"""The record of a report of `microvlm-bench precisions`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.records import Figure, Provenance
from microvlm.bench.scores.caption_records import Estimate
from microvlm.bench.scores.text_records import TextsScored
from microvlm.formats.documents import Count


class TextCost(msgspec.Struct, frozen=True):
    """One width on the texts of one file; means over tokens with intervals over texts."""

    kl: Estimate
    top1: Estimate
    nats: Estimate
    perplexity: Figure


class Width(msgspec.Struct, frozen=True):
    """One export."""

    bits: Figure
    embedding_bits: Count
    calibrated_on: str | None
    predicted_bundle_bytes: Count
    texts: list[TextCost]
    """As many as `PrecisionReport.data`."""


class PrecisionReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document."""

    model: str
    data: Annotated[list[TextsScored], Meta(min_length=1)]
    widths: Annotated[list[Width], Meta(min_length=1)]
    provenance: Provenance

    def __post_init__(self) -> None:
        if any(len(width.texts) != len(self.data) for width in self.widths):
            raise ValueError("a width has not as many costs as there are files of texts")
