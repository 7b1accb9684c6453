"""Counts how a replayed run differs from the recorded one, layer call by layer call. numpy only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from microvlm.formats.op_spec import ABSMAX_FLOOR, Q8_MAX, Q8_MIN
from microvlm.runtime import LayerCall

TIE_DISTANCE = 1e-3
"""Two right runtimes may round a value to different integers only where it is this near to a tie, in steps of an int8
activation. float32 noise at 127 steps is about 1e-5, and a layer of 1,000 sums makes at most some 1e-4 of it."""
SCALE_TOLERANCE = 1e-4
"""Largest relative difference of two scaled sums whose sums are equal: two float32 roundings, 1e-7, and the noise of
the absmax in them, which is divided out; a scale that is off by a thousandth is found."""
TIE_STEP = 1
"""A tie rounds to one neighbour or the other; a difference of two steps is not a tie."""


class FirstDifference(NamedTuple):
    """The first call of a layer, in the order of the run, that ties do not explain."""

    layer: str
    what: str
    """`input` (the fault lies between the layer before and this one), `sums`, `operator` or `scale`."""
    after: str | None
    """The layer that was called before it and was right."""

    @property
    def sentence(self) -> str:
        if self.what == "input":
            behind = f", behind {self.after}" if self.after else ""
            return f"the input of {self.layer} is the first that differs{behind}"
        where = {
            "sums": "the integer sums",
            "operator": "the operator's outputs, which are not its sums times its scales,",
            "scale": "the scales",
        }
        return f"{where[self.what]} of {self.layer} are the first that differ"


@dataclass
class Differences:
    """Counts over every replayed call."""

    activations: int = 0
    activations_differing: int = 0
    activations_off_ties: int = 0
    """Those of them that no tie explains."""
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
    scales_differing: int = 0
    """Scaled sums that differ from the recorded ones although the sums are equal."""
    differing_by_layer: dict[str, int] = field(default_factory=dict)
    first: FirstDifference | None = None
    """Where the replaying model starts to differ; None where only rounding ties were met."""
    first_tie: str | None = None
    """The layer of the first activation that differs by a rounding tie."""
    _last_right: str | None = None

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

    def compare_scales(self, call: LayerCall, recorded: np.ndarray, recorded_x: np.ndarray) -> None:
        """Compare scaled sums with the `recorded` ones, both of equal sums, each in units of its own absmax."""
        if call.scaled_sums is None:
            return
        factor = _absmax(call.x) / _absmax(recorded_x)
        distance = np.abs(call.scaled_sums - recorded * factor)
        wrong = ~(distance <= SCALE_TOLERANCE * np.abs(recorded * factor))
        rows = rows_above_floor(call.x) & rows_above_floor(recorded_x)
        self.scales_differing += int(wrong[rows].sum())

    @contextmanager
    def of_call(self, layer: str) -> Iterator[None]:
        """A context in which one call is compared: afterwards `first` and `first_tie` are up to date."""
        before = self._faults()
        ties = self.activations_differing
        yield
        if self.first_tie is None and self.activations_differing > ties and self.only_ties:
            self.first_tie = layer
        kinds = [kind for kind, count in self._faults().items() if count > before[kind]]
        if self.first is None and kinds:
            self.first = FirstDifference(layer, kinds[0], self._last_right)
        if not kinds:
            self._last_right = layer

    def _faults(self) -> dict[str, int]:
        """Counts of what no tie explains; an input comes before what is made of it."""
        return {
            "input": self.activations_off_ties,
            "sums": self.sums_differing,
            "operator": self.operator_mismatches,
            "scale": self.scales_differing,
        }

    def compare_fused(self, node: str, outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
        """Compare a fused node's outputs with those of its opened layers, which computed the same."""
        with self.of_call(node):
            for output, opened in zip(outputs, expected, strict=True):
                wrong = ~((output == opened) | (np.isnan(output) & np.isnan(opened)))
                self.operator_outputs += output.size
                self.operator_mismatches += int(wrong.sum())

    def _measure(self, layer: str, unrounded: np.ndarray, own: np.ndarray, recorded: np.ndarray) -> None:
        step = np.abs(own.astype(np.int16) - recorded)
        distance = np.abs(np.abs(unrounded - np.trunc(unrounded)) - 0.5)
        self.activations_differing += step.size
        self.max_step = max(self.max_step, int(step.max()))
        self.activations_off_ties += int(((step > TIE_STEP) | ~(distance <= TIE_DISTANCE)).sum())
        worst = float(distance.max())
        self.max_tie_distance = max(self.max_tie_distance, worst if np.isfinite(worst) else 1.0)
        self.differing_by_layer[layer] = self.differing_by_layer.get(layer, 0) + step.size


def _in_steps(x: np.ndarray) -> np.ndarray:
    """float32 [..., K] -> the values just before rounding, in steps of an int8 activation; finite."""
    return np.nan_to_num(x * (Q8_MAX / _absmax(x)))


def _absmax(x: np.ndarray) -> np.ndarray:
    """float32 [..., K] -> [..., 1], at least the floor."""
    return np.maximum(np.abs(x).max(-1, keepdims=True), ABSMAX_FLOOR)


def rows_above_floor(x: np.ndarray) -> np.ndarray:
    """float32 [..., K] -> bool [...]: rows whose absmax is finite and above the floor of 1e-5."""
    absmax = np.abs(x).max(-1)
    return (absmax > ABSMAX_FLOOR) & np.isfinite(absmax)
