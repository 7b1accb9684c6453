"""Is a saved graph the model it was made from? Each file runs in ONNX Runtime beside the eager model, output by output.

A difference has two possible causes. Activation codes are rounded, and a value a few ulp from a .5 tie may round the
other way in another runtime, which moves everything after it by a whole code: that is no error. Anything else is one.
So where the free-running outputs differ by more than the tolerance, the graph runs again with the input of every
quantised layer as an extra output, and the eager model repeats ONNX Runtime's own codes: ties are gone, errors stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from microvlm.exporters import contract
from microvlm.exporters.contract import Dim, GraphSpec
from microvlm.exporters.tracing import call, example_inputs
from microvlm.lowering import named_packed, set_traced
from microvlm.model import MicroVLM
from microvlm.op_table import DOMAIN, quantize_activations

TOLERANCE = 1e-4
"""Largest difference allowed, times max(1, largest magnitude): 24 layers of float32 sums in another order give about
1e-5, one code gone wrong gives 1e-2."""
TIE_DISTANCE = 1e-3
"""A code may differ only where the value was this near to a tie, in code steps."""
_SIZES: dict[Dim, int] = {contract.BATCH: 2, contract.SEQUENCE: 3, contract.PAST: 4, contract.TOTAL: 7}


@dataclass(frozen=True)
class Check:
    """The comparison of one output of one graph."""

    graph: str
    output: str
    passed: bool
    max_abs_diff: float


@dataclass(frozen=True)
class CodeDifferences:
    """How the activation codes of two runtimes compared."""

    codes: int
    differing: int
    max_step: int
    max_tie_distance: float

    @property
    def only_ties(self) -> bool:
        return self.max_step <= 1 and self.max_tie_distance <= TIE_DISTANCE


def check_graph(
    model: MicroVLM, spec: GraphSpec, path: Path, threads: int = 0
) -> tuple[list[Check], str | None]:
    """Compare the saved graph at `path` with the lowered `model` on seeded inputs: a Check an output, and a remark.

    `threads` is ONNX Runtime's intra-op count, 0 for its own choice.
    """
    set_traced(model, False)
    inputs = example_inputs(spec, _SIZES, seed=1, vocab_size=model.config.text.vocab_size)
    with torch.no_grad():
        wanted = [tensor.numpy() for tensor in call(model, spec, inputs)]
    feeds = {tensor.name: value.numpy() for tensor, value in zip(spec.inputs, inputs, strict=True)}
    names = [tensor.name for tensor in spec.outputs]
    got = _session(path, threads).run(names, feeds)
    checks = _compare(spec, got, wanted)
    if all(check.passed for check in checks):
        return checks, None
    return _check_replayed(model, spec, path, threads, inputs, checks)


def _check_replayed(
    model: MicroVLM,
    spec: GraphSpec,
    path: Path,
    threads: int,
    inputs: tuple[Tensor, ...],
    free_running: Sequence[Check],
) -> tuple[list[Check], str]:
    feeds = {tensor.name: value.numpy() for tensor, value in zip(spec.inputs, inputs, strict=True)}
    names = [tensor.name for tensor in spec.outputs]
    got, layer_inputs = run_with_layer_inputs(path, names, feeds, threads)
    wanted, codes = replay(model, spec, inputs, layer_inputs)
    checks = _compare(spec, got, wanted)
    worst = max(check.max_abs_diff for check in free_running)
    if all(check.passed for check in checks) and codes.only_ties:
        return checks, (
            f"{spec.name}: {codes.differing} of {codes.codes} activation codes rounded the other way, each within "
            f"{codes.max_tie_distance:.1e} of a tie, which moved an output by {worst:.1e}; with equal codes they agree."
        )
    return [Check(c.graph, c.output, False, c.max_abs_diff) if not c.passed else c for c in free_running], (
        f"{spec.name}: the difference is not a rounding tie ({codes.differing} of {codes.codes} codes differ, "
        f"by up to {codes.max_step}, {codes.max_tie_distance:.1e} from a tie)."
    )


def _compare(spec: GraphSpec, got: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> list[Check]:
    checks = []
    for tensor, ours, theirs in zip(spec.outputs, wanted, got, strict=True):
        if ours.shape != theirs.shape:
            checks.append(Check(spec.name, tensor.name, False, float("inf")))
            continue
        difference = float(np.abs(ours - theirs).max())
        limit = TOLERANCE * max(1.0, float(np.abs(ours).max()))
        # A NaN compares false, so it fails.
        checks.append(Check(spec.name, tensor.name, difference <= limit, difference))
    return checks


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_with_layer_inputs(
    path: Path, names: Sequence[str], feeds: dict[str, np.ndarray], threads: int = 0
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Run a saved graph with the float input of every quantised layer as an extra output, by the layer's model name."""
    proto = onnx.load(path, load_external_data=False)
    where = {
        node.input[1].rpartition(".")[0]: node.input[0]
        for node in proto.graph.node
        if node.domain == DOMAIN and node.op_type.endswith(("MatMul", "MatMul2x4", "MatMul3x5"))
    }
    extra = [name for name in dict.fromkeys(where.values()) if name not in names]
    graph_inputs = {value.name for value in proto.graph.input}
    added = [name for name in extra if name not in graph_inputs]
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in added
    )
    # Beside the original, because external data is found relative to the file.
    aside = path.with_name(f".{path.name}.replay")
    try:
        aside.write_bytes(proto.SerializeToString())
        values = _session(aside, threads).run([*names, *added], feeds)
    finally:
        aside.unlink(missing_ok=True)
    by_name = {**feeds, **dict(zip([*names, *added], values, strict=True))}
    return values[: len(names)], {layer: by_name[name] for layer, name in where.items()}


def replay(
    model: MicroVLM, spec: GraphSpec, inputs: tuple[Tensor, ...], layer_inputs: dict[str, np.ndarray]
) -> tuple[list[np.ndarray], CodeDifferences]:
    """Run the eager model with the codes of `layer_inputs` in place of its own, and compare the two sets of codes."""
    counts = {"codes": 0, "differing": 0, "max_step": 0}
    ties = [0.0]

    def tap_for(theirs: np.ndarray):
        codes = quantize_activations(theirs)[0]
        peak = np.maximum(np.abs(theirs).max(-1, keepdims=True), np.float32(1e-5))
        scaled = theirs * (np.float32(127) / peak)

        def tap(ours: Tensor) -> Tensor:
            step = np.abs(ours.numpy() - codes)
            moved = step != 0
            counts["codes"] += codes.size
            counts["differing"] += int(moved.sum())
            counts["max_step"] = max(counts["max_step"], int(step.max()))
            if moved.any():
                ties.append(float(np.abs(np.abs(scaled[moved] - np.rint(scaled[moved])) - 0.5).max()))
            return torch.from_numpy(codes.astype(np.float32))

        return tap

    layers = named_packed(model)
    try:
        for name, theirs in layer_inputs.items():
            layers[name].tap = tap_for(theirs)
        with torch.no_grad():
            outputs = [tensor.numpy() for tensor in call(model, spec, inputs)]
    finally:
        for name in layer_inputs:
            layers[name].tap = None
    return outputs, CodeDifferences(**counts, max_tie_distance=max(ties))
