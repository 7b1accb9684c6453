"""Checks a saved graph against the model that it was exported from, output by output, on stock ONNX Runtime.

A difference has two possible causes. Activations are rounded to int8, and a value a few ulp from a .5 tie may round the
other way in another runtime, which moves everything after it by a whole step: that is not an error. Anything else is.
So where outputs differ by more than the tolerance, the eager model runs again on the int8 activations of ONNX Runtime
(`exporters.replay`): ties are gone, errors stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from microvlm.backends.threads import pool_threads
from microvlm.exporters import contract
from microvlm.exporters.contract import Dim, GraphSpec
from microvlm.exporters.replay.differences import Differences
from microvlm.exporters.replay.graph_probe import probe
from microvlm.exporters.replay.recording import Diverged, Recorder, Recording, Replayer
from microvlm.exporters.tracing import call, example_inputs
from microvlm.model.lowering import set_traced
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_runtime import listening

TOLERANCE = 1e-4
"""Largest difference allowed, times max(1, largest magnitude): 24 layers of float32 sums in another order give about
1e-5, one wrong int8 activation gives 1e-2."""
_SIZES: dict[Dim, int] = {contract.BATCH: 2, contract.SEQUENCE: 3, contract.PAST: 4, contract.TOTAL: 7}


@dataclass(frozen=True)
class Check:
    """The comparison of one output of one graph."""

    graph: str
    output: str
    passed: bool
    max_abs_diff: float


def check_graph(
    model: MicroVLM, spec: GraphSpec, path: Path, threads: int = 0
) -> tuple[list[Check], str | None]:
    """Compare the saved graph at `path` with the lowered `model` on seeded inputs: a Check per output, and a remark.

    `threads` is ONNX Runtime's intra-op count, 0 for the usable cores. Where rounding ties explain every difference,
    the Checks are those of the replay, and the remark says how many activations differed and how far from a tie.
    """
    inputs, feeds, expected = _example(model, spec)
    names = [tensor.name for tensor in spec.outputs]
    session = onnxruntime.InferenceSession(
        str(path), session_options(threads), providers=["CPUExecutionProvider"]
    )
    free = _compare(spec, session.run(names, feeds), expected)
    if all(check.passed for check in free):
        return free, None
    del session
    worst = max(check.max_abs_diff for check in free)
    differences = Differences()
    recording, outputs = record(path, feeds, differences, threads)
    try:
        expected = replay(model, spec, inputs, recording, differences)
    except Diverged as clause:
        return free, f"{spec.name}: outputs differ by up to {worst:.1e}, and {clause}."
    replayed = _compare(spec, [outputs[name] for name in names], expected)
    explained = differences.activations_differing and differences.only_ties
    if explained and differences.arithmetic_is_equal and all(check.passed for check in replayed):
        return replayed, (
            f"{spec.name}: {differences.activations_differing} of {differences.activations} int8 activations rounded "
            f"the other way, each within {differences.max_tie_distance:.1e} of a tie, which moved an output by "
            f"{worst:.1e}; with equal activations they agree."
        )
    return free, (
        f"{spec.name}: outputs differ by up to {worst:.1e} and not by rounding ties "
        f"({differences.activations_differing} of {differences.activations} int8 activations differ, by up to "
        f"{differences.max_step}, at most {differences.max_tie_distance:.1e} from a tie; with equal activations "
        f"{differences.sums_differing} of {differences.sums} sums differ)."
    )


def example_outputs(model: MicroVLM, spec: GraphSpec) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Seeded inputs of a graph by name, and the outputs of the eager lowered `model` in contract order."""
    return _example(model, spec)[1:]


def _example(
    model: MicroVLM, spec: GraphSpec
) -> tuple[tuple[Tensor, ...], dict[str, np.ndarray], list[np.ndarray]]:
    set_traced(model, False)
    inputs = example_inputs(spec, _SIZES, seed=1, vocab_size=model.config.text.vocab_size)
    feeds = {tensor.name: value.numpy() for tensor, value in zip(spec.inputs, inputs, strict=True)}
    return inputs, feeds, _run_eager(model, spec, inputs)


def record(
    path: Path, feeds: dict[str, np.ndarray], differences: Differences, threads: int = 0
) -> tuple[Recording, dict[str, np.ndarray]]:
    """Run a saved graph -> a recording of its quantised layers, and its outputs by name.

    `differences` counts the operators whose output is not their sums times their scales.
    """
    probed, recording = probe(path), Recording()
    session = probed.open(session_options(threads))

    def run(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        return dict(zip(names, session.run(list(names), values), strict=True))

    return recording, probed.run(run, feeds, Recorder(recording, differences))


def replay(
    model: MicroVLM,
    spec: GraphSpec,
    inputs: tuple[Tensor, ...],
    recording: Recording,
    differences: Differences,
) -> list[np.ndarray]:
    """Run the eager model on recorded activations -> its outputs; `differences` counts how its own would differ.

    Raises Diverged where the model does not make the recorded calls.
    """
    with listening(model, Replayer(recording, differences)):
        outputs = _run_eager(model, spec, inputs)
    if recording.unused_calls:
        layer = next(layer for layer, calls in recording.layers.items() if calls)
        raise Diverged(f"{layer} was called more often in the recorded run")
    return outputs


def _run_eager(model: MicroVLM, spec: GraphSpec, inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
    with torch.no_grad():
        return [tensor.numpy() for tensor in call(model, spec, inputs)]


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Options of a check's sessions: `threads` in a node, 0 for the usable cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = pool_threads(threads or None)
    return options


def _compare(spec: GraphSpec, outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> list[Check]:
    named = zip(spec.outputs, outputs, expected, strict=True)
    return [compare_output(spec.name, tensor.name, output, reference) for tensor, output, reference in named]


def compare_output(graph: str, name: str, output: np.ndarray, reference: np.ndarray) -> Check:
    """The Check of one output against what it should be: within `TOLERANCE`, and of the same shape."""
    if reference.shape != output.shape:
        return Check(graph, name, False, float("inf"))
    difference = float(np.abs(reference - output).max())
    limit = TOLERANCE * max(1.0, float(np.abs(reference).max()))
    # A NaN compares false, so it fails.
    return Check(graph, name, difference <= limit, difference)
