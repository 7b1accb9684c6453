"""The records of a report of `microvlm-score` on texts: how far decoders are from a teacher."""

from __future__ import annotations

import msgspec

from microvlm.bench.records import Figure, Provenance
from microvlm.bench.scores.caption_records import Estimate
from microvlm.formats.documents import Count


class TextsScored(msgspec.Struct, frozen=True):
    """The texts."""

    name: str
    split: str
    texts: Count
    tokens: Count
    sha256: str


class TextRow(msgspec.Struct, frozen=True):
    """A model, or what stands for one; means over tokens, in nats and shares."""

    name: str
    kl: Estimate
    top1: Estimate
    nats: Estimate
    perplexity: Figure


class TextReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document."""

    model: str
    teacher: str
    data: TextsScored
    rows: list[TextRow]
    provenance: Provenance
