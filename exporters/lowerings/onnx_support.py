"""Which opset and IR version hold an integer type of weights: tried with the installed onnx and ONNX Runtime, once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime

from microvlm.exporters.contract import OPSET

LEAST_IR = 10
"""That of every graph in this package."""
_COLUMNS, _ROWS, _BLOCK = 64, 8, 32


@dataclass(frozen=True)
class OnnxSupport:
    """The lowest versions with which a product of dequantised weights passes onnx's checker and runs rightly."""

    type: str
    """ONNX's name of the integer type, such as INT2."""
    opset: int
    ir: int
    onnx: str
    onnxruntime: str
    """The versions that were tried. An older ONNX Runtime may refuse the graph."""

    def to_json(self) -> dict[str, Any]:
        return vars(self).copy()


@functools.cache
def support_of(data_type: onnx_ir.DataType) -> OnnxSupport | None:
    """The lowest opset, and its lowest IR version, that hold DequantizeLinear of this type; None where none does."""
    for opset in range(OPSET, onnx.defs.onnx_opset_version() + 1):
        for ir in range(LEAST_IR, onnx.IR_VERSION + 1):
            if _runs(data_type, opset, ir):
                return OnnxSupport(data_type.name, opset, ir, onnx.__version__, onnxruntime.__version__)
    return None


def _runs(data_type: onnx_ir.DataType, opset: int, ir: int) -> bool:
    random = np.random.default_rng(0)
    integers = random.integers(-1, 2, (_COLUMNS, _ROWS)).astype(np.int8)
    scale = random.uniform(0.5, 2, (_COLUMNS // _BLOCK, _ROWS)).astype(np.float32)
    x = random.standard_normal((1, _COLUMNS), np.float32)
    try:
        proto = onnx_ir.serde.serialize_model(_product(integers, scale, data_type, opset, ir))
        onnx.checker.check_model(proto, full_check=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        # The operator itself, not what ONNX Runtime would replace it by.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        (y,) = session.run(None, {"x": x})
    except Exception:  # the checker, the converter and pybind have kinds of their own without a common base
        return False
    return bool(np.allclose(y, x @ (integers * np.repeat(scale, _BLOCK, 0)), atol=1e-4))


def _product(
    integers: np.ndarray, scale: np.ndarray, data_type: onnx_ir.DataType, opset: int, ir: int
) -> onnx_ir.Model:
    def initializer(name: str, tensor: onnx_ir.Tensor) -> onnx_ir.Value:
        return onnx_ir.Value(
            name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
        )

    float_type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape((1, _COLUMNS)), type=float_type)
    weights = [
        initializer("w", onnx_ir.Tensor(integers.astype(data_type.numpy()), dtype=data_type)),
        initializer("s", onnx_ir.Tensor(scale)),
    ]
    floats = onnx_ir.node("DequantizeLinear", weights, {"axis": 0, "block_size": _BLOCK})
    product = onnx_ir.node("MatMul", [x, floats.outputs[0]])
    (y,) = product.outputs
    y.name, y.shape, y.type = "y", onnx_ir.Shape((1, _ROWS)), float_type
    graph = onnx_ir.Graph(
        [x], [y], nodes=[floats, product], initializers=weights, opset_imports={"": opset}, name="probe"
    )
    return onnx_ir.Model(graph, ir_version=ir)
