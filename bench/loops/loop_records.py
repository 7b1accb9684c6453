"""The record of a report of `microvlm-bench loops`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.records import PositiveFigure, Provenance
from microvlm.formats.documents import Count


class PredictedLoop(msgspec.Struct, frozen=True):
    """The innermost loop of one tile, and its speed by llvm-mca and by published timings of the core."""

    op: str
    packed_rows: Count
    tokens: Count
    instructions: Count
    multiply_adds: Count
    predicted_mca_macs_per_cycle: PositiveFigure
    predicted_mca_bound_macs_per_cycle: PositiveFigure
    predicted_timings_macs_per_cycle: PositiveFigure


class LoopReport(msgspec.Struct, frozen=True):
    """The whole document."""

    compiler: str
    loops: Annotated[list[PredictedLoop], Meta(min_length=1)]
    provenance: Provenance
