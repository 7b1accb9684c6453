"""The records of a report of `microvlm-bench kernels`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.records import Figure, Provenance
from microvlm.formats.documents import Count

MOST_ROWS = 4000
"""Tables have a column for every batch and a line for every contender: the square of a longer list."""


class KernelProvenance(Provenance, frozen=True, kw_only=True):
    """With what memory and a mapped file give, GB/s by number of threads."""

    kernels: str
    stream_gb_per_s: dict[str, Figure]
    mapped_stream_gb_per_s: dict[str, Figure]


class Speed(msgspec.Struct, frozen=True):
    """One contender in one cell, at its best setting."""

    shape: str
    regime: str
    threads: Count
    batch: Count
    contender: str
    gmac_per_s: Figure
    gb_per_s: Figure
    roofline_share: Figure


class Speedup(msgspec.Struct, frozen=True):
    """Our kernels against the fastest peer of one cell, and what is demanded there; None where nothing is."""

    shape: str
    regime: str
    threads: Count
    batch: Count
    best_peer: str
    best_peer_threads: Count
    speedup: Figure
    speedup_low: Figure
    speedup_high: Figure
    roofline_share: Figure
    mapped_stream_share: Figure
    met: bool
    required_speedup: Figure | None = None
    required_roofline_share: Figure | None = None


class ContenderState(msgspec.Struct, frozen=True):
    """Whether a contender ran, and why not."""

    name: str
    status: str
    reason: str | None = None


class SimulatedLoop(msgspec.Struct, frozen=True):
    """The inner loop of a tile on a simulated core."""

    op: str
    packed_rows: Count
    tokens: Count
    predicted_macs_per_cycle: Figure
    predicted_macs_per_cycle_bound: Figure


class Simulated(msgspec.Struct, frozen=True):
    """Every loop, or the reason why there is none."""

    loops: list[SimulatedLoop]
    unavailable: str | None = None


class KernelReport(msgspec.Struct, frozen=True):
    """The whole document."""

    rows: Annotated[list[Speed], Meta(max_length=MOST_ROWS)]
    bars: Annotated[list[Speedup], Meta(max_length=MOST_ROWS)]
    contenders: list[ContenderState]
    provenance: KernelProvenance
    predicted_cortex_a53: Simulated | None = None
