"""Checks a graph of another lowering than ours, and says which versions it needs.

MatMulNBits rounds activations by block and floats are not rounded at all, while the model rounds them by token. So
outputs are near the model's and not equal; a wrong layout, scale or block gives something else altogether.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx_ir import DataType

from microvlm.exporters.contract import GraphSpec
from microvlm.exporters.graph_check import Check, example_outputs, session_options
from microvlm.exporters.lowerings.onnx_support import support_of
from microvlm.model.microvlm import MicroVLM

NEAR = 0.2
"""Largest norm of an output's difference, times the output's own: unrelated outputs have about 1.4."""


def check_lowered(
    model: MicroVLM, spec: GraphSpec, path: Path, threads: int = 0
) -> tuple[list[Check], str | None]:
    """As `graph_check.check_graph`, within `NEAR`."""
    feeds, expected = example_outputs(model, spec)
    names = [tensor.name for tensor in spec.outputs]
    session = onnxruntime.InferenceSession(
        str(path), session_options(threads), providers=["CPUExecutionProvider"]
    )
    checks, shares = [], []
    for name, output, reference in zip(names, session.run(names, feeds), expected, strict=True):
        if output.shape != reference.shape:
            checks.append(Check(spec.name, name, False, float("inf")))
            continue
        share = float(np.linalg.norm(output - reference) / max(float(np.linalg.norm(reference)), 1e-6))
        shares.append(share)
        # A NaN compares false, so it fails.
        checks.append(Check(spec.name, name, share <= NEAR, float(np.abs(output - reference).max())))
    worst = max(shares, default=float("inf"))
    return (
        checks,
        f"{spec.name}: outputs differ by at most {worst:.1e} of their norm." if worst > 1e-4 else None,
    )


def versions_of(folder: Path, lowering: str) -> dict[str, Any]:
    """The manifest's versions that differ from those of our own graphs: the highest that a graph of the bundle has.

    `types` has what was tried with each integer type of weights: `onnx_support`.
    """
    if lowering == "custom":
        return {}
    opset, ir, types = 0, 0, set()
    for path in sorted((folder / "onnx").glob("*.onnx")):
        model = onnx.load(str(path), load_external_data=False)
        opset = max(opset, *(each.version for each in model.opset_import if not each.domain))
        ir = max(ir, model.ir_version)
        types |= {tensor.data_type for tensor in model.graph.initializer}
    tried = [
        support
        for each in (DataType.INT2, DataType.INT4, DataType.INT8)
        if each.value in types and (support := support_of(each))
    ]
    return {
        "opset": opset,
        "ir": ir,
        "minimum_onnxruntime": onnxruntime.__version__,
        **({"types": [support.to_json() for support in tried]} if lowering == "qdq" else {}),
    }
