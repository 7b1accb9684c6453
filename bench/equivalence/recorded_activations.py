"""What one run recorded of every quantised layer, and the count of how a second run compared. numpy only.

A layer's entry is its activation codes and its integer sums, in the order of its calls. The second run consumes the
entries in the same order; when it asks for more, or for another shape, it went another way (`Diverged`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from microvlm.formats.op_spec import ABSMAX_FLOOR, Q8_MAX


class Diverged(Exception):
    """The replaying run made a call that the recorded one did not make."""


class Entry(NamedTuple):
    """One call of one layer."""

    codes: np.ndarray
    """int8 [..., K]."""
    sums: np.ndarray
    """Integers as float32 [..., N], as every operator hands them to its scaling."""


@dataclass
class Tape:
    """Entries by layer, first in first out."""

    layers: dict[str, deque[Entry]] = field(default_factory=dict)

    def add(self, layer: str, codes: np.ndarray, sums: np.ndarray) -> None:
        # torch's codes of a token that is not finite may be NaN, where the table has 0.
        self.layers.setdefault(layer, deque()).append(Entry(np.nan_to_num(codes).astype(np.int8), sums))

    def take(self, layer: str, shape: tuple[int, ...] | None = None) -> Entry:
        """The layer's next entry. Raises Diverged where there is none, or none of this shape."""
        queue = self.layers.get(layer)
        if not queue:
            raise Diverged(f"{layer} was called more often than in the recorded run")
        entry = queue.popleft()
        if shape is not None and entry.codes.shape != shape:
            raise Diverged(f"{layer} has {shape} codes where {entry.codes.shape} were recorded")
        return entry

    @property
    def left(self) -> int:
        """Entries nobody asked for."""
        return sum(map(len, self.layers.values()))


@dataclass
class Comparison:
    """Counts over every replayed call."""

    codes: int = 0
    codes_differing: int = 0
    max_code_step: int = 0
    max_tie_distance: float = 0.0
    """Largest distance of x * 127 / peak from a .5 tie where a code differs, in codes."""
    sums: int = 0
    sums_differing: int = 0
    rows_at_floor: int = 0
    """Rows of a peak of at most 1e-5 or of none that is finite, whose sums are not compared."""
    operator_outputs: int = 0
    operator_mismatches: int = 0
    """Outputs of the operator itself, on equal codes, that are not its sums times its scales, bit for bit."""
    differing_by_layer: dict[str, int] = field(default_factory=dict)

    def compare_codes(self, layer: str, x: np.ndarray, recorded: np.ndarray) -> np.ndarray:
        """The candidate's input x [..., K] against recorded codes int8 -> bool [...], rows whose codes are equal."""
        peak = np.maximum(np.abs(x).max(-1, keepdims=True), ABSMAX_FLOOR)
        scaled = np.nan_to_num(x * (Q8_MAX / peak))
        own = np.clip(np.rint(scaled), -128, 127).astype(np.int8)
        self.codes += own.size
        moved = own != recorded
        if moved.any():
            self._measure(layer, scaled[moved], own[moved], recorded[moved])
        return ~moved.any(-1)

    def compare_sums(self, sums: np.ndarray, recorded: np.ndarray, above_floor: np.ndarray) -> None:
        """float32 integers [..., N] of both; `above_floor` bool [...] chooses the rows that count."""
        self.rows_at_floor += int((~above_floor).sum())
        wrong = (sums != recorded)[above_floor]
        self.sums += wrong.size
        self.sums_differing += int(wrong.sum())

    def compare_operator(self, direct: np.ndarray, scaled: np.ndarray, rows: np.ndarray) -> None:
        """float32 [..., N] of the operator and of its sums, at `rows` bool [...]."""
        wrong = (direct != scaled)[rows]
        self.operator_outputs += wrong.size
        self.operator_mismatches += int(wrong.sum())

    def _measure(self, layer: str, scaled: np.ndarray, own: np.ndarray, recorded: np.ndarray) -> None:
        step = np.abs(own.astype(np.int16) - recorded)
        distance = np.abs(np.abs(scaled - np.trunc(scaled)) - 0.5)
        self.codes_differing += step.size
        self.max_code_step = max(self.max_code_step, int(step.max()))
        worst = float(distance.max())
        self.max_tie_distance = max(self.max_tie_distance, worst if np.isfinite(worst) else 1.0)
        self.differing_by_layer[layer] = self.differing_by_layer.get(layer, 0) + step.size


def floor_rows(x: np.ndarray) -> np.ndarray:
    """float32 [..., K] -> bool [...], rows whose peak is above the floor and finite."""
    peak = np.abs(x).max(-1)
    return (peak > ABSMAX_FLOOR) & np.isfinite(peak)
