"""The records of a report of `microvlm-bench equivalence`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.records import Figure, Provenance
from microvlm.formats.documents import Count


class Side(msgspec.Struct, frozen=True):
    """One of the two models that were compared."""

    backend: str
    model: str
    kernels: str | None = None


class Replay(msgspec.Struct, frozen=True):
    """Figures with equal int8 activations ("codes"); None, all of them, where nothing could be replayed."""

    greedy_match: Figure | None
    logits_max_abs_diff: Figure | None
    codes: Count | None
    codes_differing: Count | None
    max_code_step: Count | None
    max_tie_distance: Figure | None
    sums: Count | None = None
    sums_differing: Count | None = None
    memory_drift: Figure | None = None
    unavailable: str | None = None

    def __post_init__(self) -> None:
        counts = (self.codes_differing, self.max_code_step, self.sums, self.sums_differing)
        if self.codes is not None and None in counts:
            raise ValueError("codes_differing, max_code_step, sums or sums_differing is missing beside codes")

    @property
    def sums_equal(self) -> str:
        """Equal integer sums of all."""
        sums = self.sums or 0
        return f"{sums - (self.sums_differing or 0):,} of {sums:,}"

    @property
    def differing_codes(self) -> str:
        """int8 activations that differ, of all."""
        return f"{self.codes_differing or 0:,} of {self.codes or 0:,}"


class Accuracy(msgspec.Struct, frozen=True):
    """Shares of right answers to one kind of sample."""

    samples: Count
    reference: Figure
    candidate: Figure


class Start(msgspec.Struct, frozen=True):
    """Where the candidate starts to differ; None where it does not."""

    layer: str | None = None
    sentence: str | None = None
    tie: str | None = None
    """The first layer with a rounding tie."""


class AnsweredPicture(msgspec.Struct, frozen=True):
    """Answers of both sides to one picture of the package's own sets."""

    picture: str
    prompt: str
    right: str
    reference: str
    candidate: str


Quantiles = list[Annotated[list[Figure], Meta(min_length=2, max_length=2)]]
"""[percent, value] pairs."""


class EquivalenceReport(msgspec.Struct, frozen=True):
    """The whole document. A figure that was not finite is None."""

    verdict: str
    reasons: list[str]
    question: str
    reference: Side
    candidate: Side
    samples: Count
    positions: Count
    greedy_match: Figure | None
    top1_agreement: Figure | None
    logits_max_abs_diff: Figure | None
    kl_mean: Figure | None
    kl_p99: Figure | None
    kl_max: Figure | None
    memory_drift: Figure | None
    replay: Replay
    accuracy: dict[str, Accuracy]
    provenance: Provenance
    top5_agreement: Figure | None = None
    """None, as the fields below, in documents of older versions."""
    probability_change_rms: Figure | None = None
    kl_quantiles: Quantiles | None = None
    margin_quantiles: Quantiles | None = None
    flipped_margins: list[Figure] | None = None
    starts_at: Start = Start()
    examples: list[AnsweredPicture] = []
