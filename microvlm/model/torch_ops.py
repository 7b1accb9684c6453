"""The operators of `op_table` in torch: eager arithmetic, and symbols that a trace keeps as one node each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from microvlm.formats.op_spec import ABSMAX_FLOOR, Q8_MAX, Q8_MIN, OpSpec
from microvlm.formats.op_table import OPS
from microvlm.formats.packing import GROUP, TernaryLayout

NAMESPACE = "microvlm"
EXACT_IN_FLOAT32 = 2**24
"""Integers below this are exact in float32, so a float32 product of integers is exact while every partial sum is."""


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [..., K] -> (activations_q8 as float32 integers [..., K], activation_scale [..., 1]), as `op_spec` says.

    Integers that are floats need no rule for a row that is not finite: every NaN and infinity of it becomes a NaN,
    and the scale NaN or infinite, so that all its outputs are NaN, as the table says.
    """
    absmax = x.abs().amax(-1, keepdim=True).clamp(min=float(ABSMAX_FLOOR))
    # A tensor over a tensor: torch computes `127.0 / absmax` as a product with a rounded reciprocal, and CUDA does so
    # for `absmax / 127.0`, each a last bit away from the division that the table and ONNX Runtime perform.
    limit = torch.full_like(absmax, float(Q8_MAX))
    activations_q8 = (x * (limit / absmax)).round_().clamp_(float(Q8_MIN), float(Q8_MAX))
    return activations_q8, absmax / limit


def integer_sums(activations_q8: Tensor, weights: Tensor, weight_absmax: int) -> Tensor:
    """Exact sums of integer-valued activations_q8 [..., K] and float32 integer weights [N, K]; max |weight| is known.

    float32 where every partial sum fits 24 bits, float64 where it may not (K > 1,032 at eight bits).
    """
    if 128 * weight_absmax * weights.shape[1] < EXACT_IN_FLOAT32:
        return torch.nn.functional.linear(activations_q8, weights)
    return torch.nn.functional.linear(activations_q8.double(), weights.double()).float()


def multiplies_int8(device_type: str) -> bool:
    """Whether int8 products with int32 sums are faster here than float32 ones: x86 with VNNI instructions.

    Measured on one core with AVX512-VNNI: four times as fast. Other processors may emulate them, which is slower.
    """
    return device_type == "cpu" and torch.cpu._is_vnni_supported() and torch.backends.mkldnn.is_available()


def int8_sums(activations_q8: Tensor, weights: Tensor) -> Tensor:
    """Exact sums int32 [..., N] of int8 activations_q8 [..., K] and int8 weights [N, K]; K is at most 2^17.

    As float32 they are bit for bit those of `integer_sums`: either rounds the exact sum once.
    """
    sums = torch._int_mm(activations_q8.flatten(0, -2), weights.T)
    return sums.unflatten(0, activations_q8.shape[:-1])


def full_precision(device_type: str) -> AbstractContextManager:
    """Autocast off, if it is on at all: for integers that must stay exact and a memory that must keep its float32."""
    return (
        torch.autocast(device_type, enabled=False)
        if torch.is_autocast_enabled(device_type)
        else nullcontext()
    )


def scale_sums(sums: Tensor, activation_scale: Tensor, scale: Tensor) -> Tensor:
    """[..., N] times ([..., 1] times [1] or [N]), in this order."""
    return sums * (activation_scale * scale)


def unpack_planes(packed: Tensor, rows: int, layout: TernaryLayout) -> Tensor:
    """uint8 [R, K] -> float32 trits [N, K]."""
    powers = [layout.base**p for p in range(layout.rows_per_byte)]
    wide = packed.to(torch.int32)
    planes = [(wide // power) % layout.base for power in powers]
    return (torch.cat(planes)[:rows] - 1).float()


def unpack_int8(packed: Tensor, *, rows: int, columns: int) -> Tensor:
    """uint8 [N, K] -> float32 integers [N, K]."""
    return packed.float() - 128.0


def unpack_int4(packed: Tensor, multiplier: Tensor, *, rows: int, columns: int) -> Tensor:
    """uint8 [N, Kp/2], uint8 [N, G] -> float32 integers q * multiplier [N, K]."""
    wide = packed.to(torch.int32)
    q = torch.stack([wide & 15, wide >> 4], -1).flatten(-2) - 8
    return (q * multiplier.to(torch.int32).repeat_interleave(GROUP, -1))[..., :columns].float()


UNPACK: dict[str, Callable[..., Tensor]] = {"int8": unpack_int8, "int4": unpack_int4}
"""Storage kind -> (operands before `scale`, rows=N, columns=K) -> float32 integers [N, K]; planes need no entry."""


def unpack(op: OpSpec, *operands: Tensor, rows: int, columns: int) -> Tensor:
    """The integer weights of a matrix [N, K] as float32, from `op`'s operands before `scale`."""
    if op.trit_layout is not None:
        (packed,) = operands
        return unpack_planes(packed, rows, op.trit_layout)
    return UNPACK[op.kind](*operands, rows=rows, columns=columns)


def call(op: OpSpec, first: Tensor, weights: dict[str, Tensor], rows: int, columns: int) -> Tensor:
    """`op` as one torch operator: `first` is x [..., K] or input_ids [...], `weights` a matrix [rows, columns]."""
    attributes = {"rows": rows, "columns": columns}
    operator = getattr(getattr(torch.ops, NAMESPACE), op.torch_op)
    return operator(
        first,
        *(weights[name] for name in op.weight_names),
        *(attributes[name] for name in op.attributes),
    )


def _define(op: OpSpec) -> None:
    """Register `op` with torch: its operands and attributes in the table's order, its arithmetic and its shape."""

    def split(arguments: tuple) -> tuple[list[Tensor], Tensor, dict[str, int]]:
        count = len(op.weight_names)
        *operands, scale = arguments[:count]
        return operands, scale, dict(zip(op.attributes, arguments[count:], strict=True))

    def multiply(x: Tensor, *arguments: Tensor | int) -> Tensor:
        operands, scale, attributes = split(arguments)
        rows = attributes.get("rows", operands[0].shape[0])
        weights = unpack(op, *operands, rows=rows, columns=x.shape[-1])
        with full_precision(x.device.type):
            activations_q8, activation_scale = quantize_activations(x.float())
            return scale_sums(
                integer_sums(activations_q8, weights, op.weight_absmax), activation_scale, scale
            )

    def look_up(input_ids: Tensor, *arguments: Tensor | int) -> Tensor:
        operands, scale, attributes = split(arguments)
        columns = attributes.get("columns", operands[0].shape[1])
        flat = input_ids.reshape(-1)
        integers = unpack(op, *(t[flat] for t in operands), rows=flat.shape[0], columns=columns)
        return (integers * scale[flat].unsqueeze(-1)).reshape(*input_ids.shape, columns)

    def fake_product(x: Tensor, *arguments: Tensor | int) -> Tensor:
        operands, _, attributes = split(arguments)
        return x.new_empty((*x.shape[:-1], attributes.get("rows", operands[0].shape[0])))

    def fake_lookup(input_ids: Tensor, *arguments: Tensor | int) -> Tensor:
        operands, scale, attributes = split(arguments)
        return scale.new_empty((*input_ids.shape, attributes.get("columns", operands[0].shape[1])))

    parameters = [f"Tensor {operand.name}" for operand in op.inputs]
    parameters += [f"SymInt {name}" for name in op.attributes]
    operator = torch.library.custom_op(
        f"{NAMESPACE}::{op.torch_op}",
        look_up if op.is_lookup else multiply,
        mutates_args=(),
        schema=f"({', '.join(parameters)}) -> Tensor",
    )
    operator.register_fake(fake_lookup if op.is_lookup else fake_product)


for _op in OPS.values():
    _define(_op)


@torch.library.custom_op("microvlm::keep_last", mutates_args=())
def keep_last(hidden: Tensor, count: Tensor) -> Tensor:
    """[B, S, H] and an int64 scalar n >= 1 -> the last n positions [B, n, H]; ONNX Slice in a trace."""
    return hidden[:, -int(count) :].clone()


@keep_last.register_fake
def _fake_keep_last(hidden: Tensor, count: Tensor) -> Tensor:
    kept_tokens = torch.library.get_ctx().new_dynamic_size()
    return hidden.new_empty((hidden.shape[0], kept_tokens, hidden.shape[2]))


@torch.library.custom_op("microvlm::rotate_blocks", mutates_args=())
def rotate_blocks(x: Tensor, width: int) -> Tensor:
    """Blocks of `width` columns of [..., K] times Sylvester's orthonormal Hadamard matrix [width, width], in float32.

    The additions have the order of `layer_table`. `width` is a power of four that divides K.
    """
    # A block's columns are rows here, so that each addition reads and writes long rows.
    y = x.reshape(-1, width).T.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    sums = torch.empty_like(y)
    stride = 1
    while stride < width:
        pairs = (width // (2 * stride), 2, stride, y.shape[1])
        first, second = y.view(pairs).unbind(1)
        upper, lower = sums.view(pairs).unbind(1)
        torch.add(first, second, out=upper)
        torch.sub(first, second, out=lower)
        y, sums = sums, y
        stride *= 2
    return (y.T * width**-0.5).contiguous().view(x.shape)


@rotate_blocks.register_fake
def _fake_rotate_blocks(x: Tensor, width: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _rotation_width(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.width, ctx.dtype = inputs[1], inputs[0].dtype


def _rotate_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return rotate_blocks(grad, ctx.width).to(ctx.dtype), None  # the matrix is symmetric


rotate_blocks.register_autograd(_rotate_gradient, setup_context=_rotation_width)
