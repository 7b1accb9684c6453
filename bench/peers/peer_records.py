"""The record of a report of `microvlm-bench peers`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from microvlm.bench.records import Estimate, Figure, Provenance
from microvlm.formats.documents import Count


class PeerShape(msgspec.Struct, frozen=True):
    """The decoder that all programs run."""

    name: str
    layers: Count
    width: Count
    inner_width: Count
    vocabulary: Count
    random: bool
    """Whether its weights are random, which costs as much time as others."""


class PeerWorkload(msgspec.Struct, frozen=True):
    """What is timed."""

    prompt_tokens: Count
    new_tokens: Count
    rounds: Count


class PeerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One program at one number of threads. Figures are None where it did not run, and `reason` says why."""

    name: str
    is_ours: bool
    threads: Count
    status: Literal["ok", "skipped", "failed"]
    reason: str | None
    version: str | None
    kernels: str | None
    weights: str
    file: str
    weight_bytes_per_token: Count | None
    prefill_tokens_per_s: Estimate | None
    decode_tokens_per_s: Estimate | None
    peak_rss_bytes: Figure | None

    def __post_init__(self) -> None:
        has_speeds = self.decode_tokens_per_s is not None and self.prefill_tokens_per_s is not None
        if (self.status == "ok") != has_speeds:
            raise ValueError("the speeds of a row are there when its status is ok, and only then")


class PeerRatio(msgspec.Struct, frozen=True):
    """Speed over one of ours: 2 is twice as fast."""

    name: str
    against: str
    threads: Count
    phase: str
    value: Figure
    low: Figure
    high: Figure


class PeerReport(msgspec.Struct, frozen=True):
    """The whole document."""

    shape: PeerShape
    workload: PeerWorkload
    rows: Annotated[list[PeerRow], Meta(min_length=1)]
    ratios: list[PeerRatio]
    provenance: Provenance
