"""The standard ONNX operators that integer convolutions of a trace become: torch operator -> nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxscript

from microvlm.exporters.contract import OPSET
from microvlm.formats.encoders.efficientnet_lite import BYTE_ZERO, LINEAR_ZERO
from microvlm.model.convolution.integer_ops import WEIGHT_ZERO

_op = onnxscript.values.Opset("", OPSET)


def _bytes(values: Any) -> Any:
    return _op.Constant(value=onnx.numpy_helper.from_array(np.asarray(values, np.uint8)))


def _integer_convolution(
    x: Any, input_scale: Any, weight: Any, weight_scale: Any, output_scale: Any, bias: Any,
    input_zero: int, output_zero: int, pads: list[int], stride: int, groups: int,
) -> Any:  # fmt: skip
    return _op.QLinearConv(
        x, input_scale, _bytes(input_zero), weight, weight_scale, _bytes([WEIGHT_ZERO] * weight.shape[0]),
        output_scale, _bytes(output_zero), bias,
        pads=list(pads), strides=[stride, stride], group=groups, kernel_shape=list(weight.shape[2:]),
    )  # fmt: skip


def _integer_sum(a: Any, b: Any, scale: Any) -> Any:
    # Of bytes with one scale these floats are whole multiples of it but for their last bits, so the rounding gives
    # a + b - 128 exactly.
    zero = _bytes(LINEAR_ZERO)
    total = _op.Add(_op.DequantizeLinear(a, scale, zero), _op.DequantizeLinear(b, scale, zero))
    return _op.QuantizeLinear(total, scale, zero)


def _pixel_bytes(pixel_values: Any, scale: Any) -> Any:
    return _op.QuantizeLinear(pixel_values, scale, _bytes(BYTE_ZERO))


CONVOLUTION_NODES: dict[str, Callable] = {
    "integer_convolution": _integer_convolution,
    "integer_sum": _integer_sum,
    "pixel_bytes": _pixel_bytes,
}
"""Name of the torch operator -> its translation."""
