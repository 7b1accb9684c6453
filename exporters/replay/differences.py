"""Counts how a replayed run differs from the recorded one, layer call by layer call. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from microvlm.formats.op_spec import ABSMAX_FLOOR, Q8_MAX, Q8_MIN
from microvlm.runtime import LayerCall

TIE_DISTANCE = 1e-3
"""Two right runtimes may round a value to different integers only where it is this near to a tie, in steps of an int8
activation. float32 noise at 127 steps is about 1e-5, and a layer of 1,000 sums makes at most some 1e-4 of it."""
TIE_STEP = 1
"""A tie rounds to one neighbour or the other; a difference of two steps is not a tie."""


@dataclass
class Differences:
    """Counts over every replayed call."""

    activations: int = 0
    activations_differing: int = 0
    max_step: int = 0
    """Largest difference of two int8 activations."""
    max_tie_distance: float = 0.0
    """Largest distance of x * 127 / absmax from a .5 tie where an activation differs, in steps. x is the input of the
    model under test, which may be either of the two."""
    sums: int = 0
    sums_differing: int = 0
    rows_at_floor: int = 0
    """Rows whose absmax is not finite or at most 1e-5. Their sums are not compared."""
    operator_outputs: int = 0
    operator_mismatches: int = 0
    """Outputs of the operator on equal activations that are not its sums times its scales, bit for bit, and outputs of
    fused nodes that are not those of their opened layers."""
    differing_by_layer: dict[str, int] = field(default_factory=dict)

    @property
    def only_ties(self) -> bool:
        """Whether rounding ties explain every activation that differs."""
        return self.max_step <= TIE_STEP and self.max_tie_distance <= TIE_DISTANCE

    @property
    def arithmetic_is_equal(self) -> bool:
        """Whether every sum and every operator's output is equal on equal activations."""
        return not self.sums_differing and not self.operator_mismatches

    def compare_activations(
        self, layer: str, x: np.ndarray, recorded: np.ndarray, recorded_x: np.ndarray | None = None
    ) -> np.ndarray:
        """Round the replaying model's input x float32 [..., K] and compare it with recorded int8 activations [..., K].

        `recorded_x` is the recorded model's input, where that is the model under test. Returns bool [...]: rows whose
        activations are equal.
        """
        unrounded = _in_steps(x)
        own = np.clip(np.rint(unrounded), Q8_MIN, Q8_MAX).astype(np.int8)
        self.activations += own.size
        differs = own != recorded
        if differs.any():
            if recorded_x is not None:
                unrounded = _in_steps(recorded_x)
            self._measure(layer, unrounded[differs], own[differs], recorded[differs])
        return ~differs.any(-1)

    def compare_sums(self, sums: np.ndarray, recorded: np.ndarray, above_floor: np.ndarray) -> None:
        """Compare float32 integers [..., N] at the rows `above_floor` bool [...]."""
        self.rows_at_floor += int((~above_floor).sum())
        wrong = (sums != recorded)[above_floor]
        self.sums += wrong.size
        self.sums_differing += int(wrong.sum())

    def compare_operator(self, call: LayerCall, rows: np.ndarray) -> None:
        """Compare the operator's output with its scaled sums at `rows` bool [...], where the call has both."""
        if call.operator_output is None or call.scaled_sums is None:
            return
        wrong = (call.operator_output != call.scaled_sums)[rows]
        self.operator_outputs += wrong.size
        self.operator_mismatches += int(wrong.sum())

    def compare_fused(self, outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
        """Compare a fused node's outputs with those of its opened layers, which computed the same."""
        for output, opened in zip(outputs, expected, strict=True):
            self.operator_outputs += output.size
            self.operator_mismatches += int(
                (~((output == opened) | (np.isnan(output) & np.isnan(opened)))).sum()
            )

    def _measure(self, layer: str, unrounded: np.ndarray, own: np.ndarray, recorded: np.ndarray) -> None:
        step = np.abs(own.astype(np.int16) - recorded)
        distance = np.abs(np.abs(unrounded - np.trunc(unrounded)) - 0.5)
        self.activations_differing += step.size
        self.max_step = max(self.max_step, int(step.max()))
        worst = float(distance.max())
        self.max_tie_distance = max(self.max_tie_distance, worst if np.isfinite(worst) else 1.0)
        self.differing_by_layer[layer] = self.differing_by_layer.get(layer, 0) + step.size


def _in_steps(x: np.ndarray) -> np.ndarray:
    """float32 [..., K] -> the values just before rounding, in steps of an int8 activation; finite."""
    absmax = np.maximum(np.abs(x).max(-1, keepdims=True), ABSMAX_FLOOR)
    return np.nan_to_num(x * (Q8_MAX / absmax))


def rows_above_floor(x: np.ndarray) -> np.ndarray:
    """float32 [..., K] -> bool [...]: rows whose absmax is finite and above the floor of 1e-5."""
    absmax = np.abs(x).max(-1)
    return (absmax > ABSMAX_FLOOR) & np.isfinite(absmax)
