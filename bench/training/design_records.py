"""The records of a comparison of designs of ternary layers (`microvlm-train designs`)."""

from __future__ import annotations

import msgspec

from microvlm.bench.records import Figure, Provenance
from microvlm.bench.scores.caption_records import Estimate
from microvlm.formats.documents import Count


class DesignScore(msgspec.Struct, frozen=True):
    """On held-out texts: KL from the start in nats a token, share of equal tokens, nats a token."""

    kl: Estimate
    top1: Estimate
    nats: Estimate
    perplexity: Figure


class DesignRow(msgspec.Struct, frozen=True):
    """A design. `rounded`: the start's weights in it, without SubLN; `trained`: after the steps."""

    name: str
    description: str
    bits_per_weight: Figure
    rounded: DesignScore
    trained: DesignScore
    step_seconds: Figure


class DesignTexts(msgspec.Struct, frozen=True):
    """A file of texts."""

    name: str
    sha256: str


class DesignTraining(msgspec.Struct, frozen=True):
    """What all designs were trained for."""

    steps: Count
    batch_size: Count
    learning_rate: Figure
    seed: Count
    tokens: Count


class DesignReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document."""

    start: str
    data: list[DesignTexts]
    texts: Count
    training: DesignTraining
    rows: list[DesignRow]
    provenance: Provenance
