"""Integer convolutions in torch: eager arithmetic, and symbols that a trace turns into standard ONNX operators.

The reference for QLinearConv, QuantizeLinear and the sum of two quantised maps: the same bytes as ONNX Runtime.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from microvlm.formats.encoders.efficientnet_lite import BYTE_ZERO, LINEAR_ZERO, STRIDE
from microvlm.model.torch_ops import EXACT_IN_FLOAT32, full_precision

WEIGHT_ZERO = 128
"""The byte of a weight that means 0. Unsigned weights, because kernels for signed ones saturate sums of two products on
processors without dot products of bytes."""


def integer_convolution_eager(
    x: Tensor, input_scale: Tensor, weight: Tensor, weight_scale: Tensor, output_scale: Tensor, bias: Tensor,
    input_zero: int, output_zero: int, pads: list[int], stride: int, groups: int,
) -> Tensor:  # fmt: skip
    """See `IntegerConvolution`. `pads` are top, left, bottom, right."""
    top, left, bottom, right = pads
    terms = weight[0].numel()
    # float32 where all partial sums of |x| <= 255 times |w| <= 127 fit its 24 bits.
    dtype = torch.float32 if terms * 255 * 127 < EXACT_IN_FLOAT32 else torch.float64
    with full_precision(x.device.type):
        centred = F.pad(x.to(dtype) - input_zero, (left, right, top, bottom))
        sums = F.conv2d(centred, weight.to(dtype) - WEIGHT_ZERO, None, stride, 0, 1, groups)
        total = (sums.to(torch.int64) + bias[:, None, None]).float()
        multiplier = input_scale * weight_scale / output_scale
        y = torch.round(total * multiplier[:, None, None]) + output_zero
        return y.clamp(0, 255).to(torch.uint8)


def integer_sum_eager(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Bytes of the sum of two maps whose bytes have one scale and the zero 128: clip(a + b - 128, 0, 255)."""
    return (a.to(torch.int32) + b.to(torch.int32) - LINEAR_ZERO).clamp(0, 255).to(torch.uint8)


def pixel_bytes_eager(pixel_values: Tensor, scale: Tensor) -> Tensor:
    """The bytes of a picture from pixels that were normalised by mean 127 / 255 and deviation 128 / 255."""
    return (torch.round(pixel_values / scale) + BYTE_ZERO).clamp(0, 255).to(torch.uint8)


def place_colours(pixels: Tensor) -> Tensor:
    """Mean colours of places, rounded half to even: pixel bytes uint8 [B, 3, S, S] -> uint8 [B, 3, S / 32, S / 32].

    The sum of the 1,024 bytes of a place is a whole number below 2^24, and their mean that over a power of two, so that
    float32 holds both exactly, in any order of the sum. These are torch's own operators in a trace too: of cast bytes,
    because ONNX Runtime fuses dequantised ones into an integer pooling with a rounding of its own.
    """
    return torch.round(F.avg_pool2d(pixels.float(), STRIDE)).to(torch.uint8)


@torch.library.custom_op("microvlm::integer_convolution", mutates_args=())
def integer_convolution(
    x: Tensor, input_scale: Tensor, weight: Tensor, weight_scale: Tensor, output_scale: Tensor, bias: Tensor,
    input_zero: int, output_zero: int, pads: list[int], stride: int, groups: int,
) -> Tensor:  # fmt: skip
    """`integer_convolution_eager` as one operator; ONNX QLinearConv in a trace."""
    return integer_convolution_eager(
        x,
        input_scale,
        weight,
        weight_scale,
        output_scale,
        bias,
        input_zero,
        output_zero,
        pads,
        stride,
        groups,
    )


@integer_convolution.register_fake
def _fake_convolution(
    x: Tensor, input_scale: Tensor, weight: Tensor, weight_scale: Tensor, output_scale: Tensor, bias: Tensor,
    input_zero: int, output_zero: int, pads: list[int], stride: int, groups: int,
) -> Tensor:  # fmt: skip
    rows = (x.shape[2] + pads[0] + pads[2] - weight.shape[2]) // stride + 1
    columns = (x.shape[3] + pads[1] + pads[3] - weight.shape[3]) // stride + 1
    return x.new_empty((x.shape[0], weight.shape[0], rows, columns))


@torch.library.custom_op("microvlm::integer_sum", mutates_args=())
def integer_sum(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """`integer_sum_eager` as one operator."""
    return integer_sum_eager(a, b, scale)


@integer_sum.register_fake
def _fake_sum(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(a)


@torch.library.custom_op("microvlm::pixel_bytes", mutates_args=())
def pixel_bytes(pixel_values: Tensor, scale: Tensor) -> Tensor:
    """`pixel_bytes_eager` as one operator; ONNX QuantizeLinear in a trace."""
    return pixel_bytes_eager(pixel_values, scale)


@pixel_bytes.register_fake
def _fake_bytes(pixel_values: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(pixel_values, dtype=torch.uint8)
