"""Designs of ternary layers that `microvlm-train designs` compares. Computes nothing; `tensor` is the shipped one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from microvlm.config import Rotation

SCALE_BITS = 16
"""Of a scale, where bits a weight are counted."""


@dataclass(frozen=True)
class TernaryDesign:
    """How the layers of a decoder become ternary."""

    name: str
    description: str
    group: int | None = None
    """Columns that share a scale; 0 for a row's, None for the whole matrix's."""
    rotation: int = 0
    """Width of the blocks that a Hadamard matrix rotates before each product; 0 for none."""
    stream_rotation: Rotation = 0
    """The same of the residual stream, whose weights are rotated beforehand (`TextConfig.rotation`)."""
    sub_norm: bool = True
    """Whether SubLN is inserted (BitDistill, arXiv 2510.13998, section 3.1)."""
    distilled: bool = True
    """Whether there is a teacher; else the cross-entropy alone trains."""


DESIGNS = {
    design.name: design
    for design in (
        TernaryDesign("tensor", "one scale a matrix"),
        TernaryDesign("row", "one scale a row", group=0),
        TernaryDesign("group", "one scale for 128 columns of a row", group=128),
        TernaryDesign("rotated", "one scale a matrix, inputs and weights rotated", rotation=64),
        TernaryDesign("stream", "one scale a matrix, the residual stream rotated", stream_rotation=64),
        TernaryDesign("plain", "one scale a matrix, no SubLN", sub_norm=False),
        TernaryDesign("qat", "one scale a matrix, no teacher", distilled=False),
    )
}


def bits_per_weight(design: TernaryDesign, columns: int) -> float:
    """Two-bit trits and their scales in a row of `columns` weights; a matrix's one scale is left out."""
    if design.group is None:
        return 2.0
    return 2.0 + SCALE_BITS * math.ceil(columns / (design.group or columns)) / columns
