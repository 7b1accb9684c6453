"""The records of a report of `microvlm-bench run`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.records import MOST_COLUMNS, Figure, ModelFiles, PositiveFigure, Provenance
from microvlm.formats.documents import Count


class Times(msgspec.Struct, frozen=True):
    """One measured phase, milliseconds."""

    median_ms: Figure
    p90_ms: Figure
    samples_ms: list[PositiveFigure] = []
    """Every timed round, in order; empty in documents of older versions."""


class Ends(msgspec.Struct, frozen=True):
    """Predicted milliseconds at both ends of a board's memory bandwidth."""

    low: Figure
    high: Figure


class Compared(msgspec.Struct, frozen=True):
    """The short check of an emulated backend against another one."""

    against: str
    verdict: str
    sums: Count | None = None
    sums_differing: Count | None = None

    def __post_init__(self) -> None:
        if self.sums is not None and self.sums_differing is None:
            raise ValueError("sums_differing is missing beside sums")


class Emulated(msgspec.Struct, frozen=True):
    """What is known of a backend that was emulated: nothing of it is a measured time."""

    cpu: str
    counted_instructions: dict[str, Count] | None = None
    predicted_ms: dict[str, Ends] | None = None
    """By phase."""
    counts_from: str | None = None
    board: str | None = None
    equivalence: Compared | None = None

    def __post_init__(self) -> None:
        if not self.predicted_ms:
            return
        if self.board is None or self.counts_from is None:
            raise ValueError("board and counts_from are missing beside predicted_ms")
        if set(self.predicted_ms) - set(self.counted_instructions or {}):
            raise ValueError("counted_instructions lacks a phase of predicted_ms")


class Result(msgspec.Struct, frozen=True):
    """One backend with one model. Without a measurement (`status` other than `ok`) figures are None."""

    label: str
    status: str
    reason: str | None
    phases: dict[str, Times]
    path: str | None = None
    decode_tokens_per_s: Figure | None = None
    weight_bytes_per_token: Count | None = None
    decode_share_of_ceiling: Figure | None = None
    peak_rss_bytes: Figure | None = None
    anonymous_bytes: Figure | None = None
    anonymous_of_model_bytes: Figure | None = None
    """May be negative: memory that loading gave back."""
    file_backed_bytes: Figure | None = None
    pss_bytes: Figure | None = None
    emulated: Emulated | None = None

    def __post_init__(self) -> None:
        if self.status == "ok" and self.weight_bytes_per_token is None:
            raise ValueError("weight_bytes_per_token is missing in an entry whose status is ok")


class Ratio(msgspec.Struct, frozen=True):
    """Median time of a phase over the reference's, with its 95 % interval."""

    phase: str
    backend: str
    against: str
    value: Figure
    low: Figure
    high: Figure


class Ceiling(msgspec.Struct, frozen=True):
    """What one core reads from memory."""

    read_bandwidth_bytes_per_s: Figure


class ModelsProvenance(Provenance, frozen=True, kw_only=True):
    """The provenance of a measurement of one or several models."""

    models: Annotated[list[ModelFiles], Meta(max_length=MOST_COLUMNS)]


class SpeedReport(msgspec.Struct, frozen=True):
    """The whole document."""

    results: Annotated[list[Result], Meta(max_length=MOST_COLUMNS)]
    provenance: ModelsProvenance
    ratios: list[Ratio] = []
    ceiling: Ceiling | None = None

    def __post_init__(self) -> None:
        if self.ceiling is None and any(result.status == "ok" for result in self.results):
            raise ValueError("ceiling is missing beside measured results")
