"""Replay: the eager model repeats the activation codes that ONNX Runtime made, so that rounding ties cannot part them.

A recording is, for every layer with activation codes, the values just before rounding: x * (127 / peak).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from microvlm.exporters.contract import GraphSpec
from microvlm.exporters.tracing import call
from microvlm.formats.op_spec import ABSMAX_FLOOR, Q8_MAX
from microvlm.formats.op_table import DOMAIN, MATMUL_BY_KIND
from microvlm.model.lowering import named_packed
from microvlm.model.microvlm import MicroVLM

TIE_DISTANCE = 1e-3
"""A code may differ only where the value was this near to a tie, in code steps."""

_WEIGHTS_FOLDER_OPTION = "session.model_external_initializers_file_folder_path"

Recording = dict[str, np.ndarray]
"""Layer name -> float32 [..., K] in code steps, not yet rounded."""


@dataclass
class CodeDifferences:
    """How the activation codes of two runtimes compared."""

    codes: int = 0
    differing: int = 0
    max_step: int = 0
    max_tie_distance: float = 0.0

    @property
    def only_ties(self) -> bool:
        return self.max_step <= 1 and self.max_tie_distance <= TIE_DISTANCE

    def add(self, ours: np.ndarray, theirs: np.ndarray, unrounded: np.ndarray) -> None:
        """Count one layer: two sets of codes, and the values that `theirs` were rounded from."""
        # A code that is no number is as far off as a code can be.
        step = np.nan_to_num(np.abs(ours - theirs), nan=255)
        moved = step > 0
        self.codes += step.size
        self.differing += int(moved.sum())
        self.max_step = max(self.max_step, int(step.max()))
        if moved.any():
            near = np.nan_to_num(unrounded[moved])
            distance = float(np.abs(np.abs(near - np.rint(near)) - 0.5).max())
            self.max_tie_distance = max(self.max_tie_distance, distance)


def session(path: Path, threads: int, proto: onnx.ModelProto | None = None) -> onnxruntime.InferenceSession:
    """Stock ONNX Runtime on the CPU; the weights beside the .onnx file `path` are mapped.

    `proto` is run in place of the file's graph when it is given.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    graph: str | bytes = str(path)
    if proto is not None:
        options.add_session_config_entry(_WEIGHTS_FOLDER_OPTION, str(path.parent.resolve()))
        graph = proto.SerializeToString()
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def record(
    path: Path, outputs: Sequence[str], feeds: dict[str, np.ndarray], threads: int = 0
) -> tuple[list[np.ndarray], Recording]:
    """Run a saved graph: its `outputs`, and what each of its layers was about to round."""
    proto = onnx.load(path, load_external_data=False)
    packed, dense = _packed_inputs(proto), _dense_inputs(proto)
    given = {*feeds, *outputs}
    added = [name for name in dict.fromkeys([*packed.values(), *dense.values()]) if name not in given]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in added)
    values = session(path, threads, proto).run([*outputs, *added], feeds)
    by_name = {**feeds, **dict(zip([*outputs, *added], values, strict=True))}
    recording = {layer: _in_code_steps(by_name[name]) for layer, name in packed.items()}
    recording.update({layer: by_name[name] for layer, name in dense.items()})
    return values[: len(outputs)], recording


def _packed_inputs(proto: onnx.ModelProto) -> dict[str, str]:
    """Layers that are one operator of ours: name -> its float input."""
    products = {op.name for op in MATMUL_BY_KIND.values()}
    return {
        node.input[1].rpartition(".")[0]: node.input[0]
        for node in proto.graph.node
        if node.domain == DOMAIN and node.op_type in products
    }


def _dense_inputs(proto: onnx.ModelProto) -> dict[str, str]:
    """Trits stored at 16 or 32 bits: name -> the input of Round, in product(Clip(Round(input)), NAME.weight)."""
    producer = {output: node for node in proto.graph.node for output in node.output}
    weights = {tensor.name for tensor in proto.graph.initializer}

    def above(name: str, *op_types: str) -> str:
        while name in producer and producer[name].op_type in op_types:
            name = producer[name].input[0]
        return name

    found = {}
    for node in proto.graph.node:
        if node.op_type in ("MatMul", "Gemm") and above(node.input[1], "Transpose", "Cast") in weights:
            rounded = above(node.input[0], "Clip")
            if rounded in producer and producer[rounded].op_type == "Round":
                found[above(node.input[1], "Transpose", "Cast").removesuffix(".weight")] = producer[
                    rounded
                ].input[0]
    return found


def _in_code_steps(x: np.ndarray) -> np.ndarray:
    absmax = np.maximum(np.abs(x).max(-1, keepdims=True), ABSMAX_FLOOR)
    return x * (Q8_MAX / absmax)


def replay(
    model: MicroVLM, spec: GraphSpec, inputs: tuple[Tensor, ...], recording: Recording
) -> tuple[list[np.ndarray], CodeDifferences]:
    """Run the eager model with the recorded codes in place of its own, and compare the two sets of codes."""
    differences = CodeDifferences()

    def tap(unrounded: np.ndarray) -> Callable[[Tensor], Tensor]:
        codes = np.clip(np.rint(unrounded), -128, 127)

        def use(ours: Tensor) -> Tensor:
            differences.add(ours.numpy(), codes, unrounded)
            return torch.from_numpy(codes)

        return use

    layers = named_packed(model)
    try:
        for name, unrounded in recording.items():
            layers[name].tap = tap(unrounded)
        with torch.no_grad():
            outputs = [tensor.numpy() for tensor in call(model, spec, inputs)]
    finally:
        for name in recording:
            layers[name].tap = None
    return outputs, differences
