"""Records the int8 activations and sums of every quantised layer, and replays them in a second model. numpy only.

The second model takes the calls of each layer in their recorded order. One that asks for another call, or for another
shape, did not follow the recording (`Diverged`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from microvlm.exporters.replay.differences import Differences, rows_above_floor
from microvlm.runtime import LayerCall


class Diverged(Exception):
    """The replaying model made a call that the recording does not hold. The message is a clause."""


class RecordedCall(NamedTuple):
    """One call of one layer."""

    activations_q8: np.ndarray
    """int8 [..., K]."""
    sums: np.ndarray
    """Integers as float32 [..., N]."""
    x: np.ndarray | None = None
    """float32 [..., K], where the recorded model is the one under test: distances from a tie are then its."""
    scaled: tuple[np.ndarray, np.ndarray] | None = None
    """Scaled sums float32 [..., N] and the inputs [..., K] that they are of, where the layer tells them."""


@dataclass
class Recording:
    """Recorded calls by layer, first in first out."""

    layers: dict[str, deque[RecordedCall]] = field(default_factory=dict)

    def add(self, layer: str, call: RecordedCall) -> None:
        """Append a call."""
        self.layers.setdefault(layer, deque()).append(call)

    def take(self, layer: str, shape: tuple[int, ...] | None = None) -> RecordedCall:
        """Remove and return the layer's next call. Raises Diverged where there is none, or none of this shape."""
        calls = self.layers.get(layer)
        if not calls:
            raise Diverged(f"{layer} was called more often than in the recorded run")
        call = calls.popleft()
        if shape is not None and call.activations_q8.shape != shape:
            raise Diverged(
                f"{layer} has activations {list(shape)} where {list(call.activations_q8.shape)} were recorded"
            )
        return call

    @property
    def unused_calls(self) -> int:
        """Calls that were not taken."""
        return sum(map(len, self.layers.values()))


class Recorder:
    """A `LayerListener` that appends every call to a recording.

    With `differences`, the recorded model is the one under test: each operator's output is compared with its own sums
    on the way, and inputs are kept, so that distances from a tie are those of the recorded values.
    """

    def __init__(self, recording: Recording, differences: Differences | None = None):
        self._recording, self._differences = recording, differences

    def replacement(self, layer: str, shape: tuple[int, ...] | None = None) -> None:
        """The layer uses its own activations."""

    def observe(self, layer: str, call: LayerCall) -> None:
        x = None if self._differences is None else call.x
        scaled = None if call.scaled_sums is None else (call.scaled_sums, call.x)
        self._recording.add(layer, RecordedCall(call.activations_q8, call.sums, x, scaled))
        if self._differences is not None:
            self._differences.compare_operator(call, rows_above_floor(call.x))

    def observe_fused(self, node: str, outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
        if self._differences is not None:
            self._differences.compare_fused(node, outputs, expected)


class Replayer:
    """A `LayerListener` that hands out recorded activations and counts how the replaying model differs."""

    def __init__(self, recording: Recording, differences: Differences):
        self._recording, self._differences = recording, differences
        self._current: dict[str, RecordedCall] = {}

    def replacement(self, layer: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """The recorded int8 activations of the layer's next call. Raises Diverged."""
        self._current[layer] = self._recording.take(layer, shape)
        return self._current[layer].activations_q8

    def observe(self, layer: str, call: LayerCall) -> None:
        """Raises Diverged for a call of another shape than the recorded one."""
        recorded = self._current.pop(layer)
        if call.x.shape != recorded.activations_q8.shape or call.sums.shape != recorded.sums.shape:
            raise Diverged(
                f"{layer} maps {list(call.x.shape)} to {list(call.sums.shape)} where "
                f"{list(recorded.activations_q8.shape)} to {list(recorded.sums.shape)} was recorded"
            )
        differences, above_floor = self._differences, rows_above_floor(call.x)
        with differences.of_call(layer):
            equal = differences.compare_activations(layer, call.x, recorded.activations_q8, recorded.x)
            differences.compare_sums(call.sums, recorded.sums, above_floor)
            differences.compare_operator(call, equal & above_floor)
            if recorded.scaled is not None and np.array_equal(call.sums, recorded.sums):
                differences.compare_scales(call, *recorded.scaled)

    def observe_fused(self, node: str, outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
        """A fused node computed with its own activations, its opened layers with the recorded ones."""
