"""The operators of `op_table` in torch: eager arithmetic, and symbols that a trace keeps as one node each."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from microvlm.formats.packing import GROUP

PEAK_FLOOR = 1e-5
EXACT_IN_FLOAT32 = 2**24
"""Integers below this are exact in float32, so a float32 product of integers is exact while every partial sum is."""


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [..., K] -> (codes as float32 integers [..., K], step [..., 1]). The order of `op_table`.

    Codes that are floats need no rule for a row that is not finite: every NaN and infinity of it becomes a code of
    NaN, and the step NaN or infinite, so that all its outputs are NaN, as the table wants.
    """
    peak = x.abs().amax(-1, keepdim=True).clamp(min=PEAK_FLOOR)
    # A tensor over a tensor: torch computes `127.0 / peak` as a product with a rounded reciprocal, and CUDA does so
    # for `peak / 127.0`, each a last bit away from the division that the table and ONNX Runtime perform.
    limit = torch.full_like(peak, 127.0)
    codes = torch.clamp(torch.round(x * (limit / peak)), -128.0, 127.0)
    return codes, peak / limit


def integer_sums(codes: Tensor, weights: Tensor, weight_peak: int) -> Tensor:
    """Exact sums of integer-valued codes [..., K] and float32 integer weights [N, K]; `weight_peak` = max |weight|.

    float32 where every partial sum fits 24 bits, float64 where it may not (K > 1,032 at eight bits).
    """
    if 128 * weight_peak * weights.shape[1] < EXACT_IN_FLOAT32:
        return torch.nn.functional.linear(codes, weights)
    return torch.nn.functional.linear(codes.double(), weights.double()).float()


def full_precision(device_type: str) -> AbstractContextManager:
    """Where integers must stay exact and a memory must keep its float32: autocast off, if it is on at all."""
    return (
        torch.autocast(device_type, enabled=False)
        if torch.is_autocast_enabled(device_type)
        else nullcontext()
    )


def scale_sums(sums: Tensor, step: Tensor, scale: Tensor) -> Tensor:
    return sums * (step * scale)


def unpack_ternary(packed: Tensor, rows: int, base: int, rows_per_byte: int) -> Tensor:
    """uint8 [R, K] -> float32 trits [N, K]."""
    powers = [base**p for p in range(rows_per_byte)]
    wide = packed.to(torch.int32)
    planes = [(wide // power) % base for power in powers]
    return (torch.cat(planes)[:rows] - 1).float()


def unpack_int8(packed: Tensor) -> Tensor:
    """uint8 [..., K] -> float32 integers [..., K]."""
    return packed.float() - 128.0


def unpack_int4(packed: Tensor, multiplier: Tensor, columns: int) -> Tensor:
    """uint8 [N, Kp/2], uint8 [N, G] -> float32 integers q * multiplier [N, K]."""
    wide = packed.to(torch.int32)
    q = torch.stack([wide & 15, wide >> 4], -1).flatten(-2) - 8
    return (q * multiplier.to(torch.int32).repeat_interleave(GROUP, -1))[..., :columns].float()


def _matmul(x: Tensor, weights: Tensor, scale: Tensor, weight_peak: int) -> Tensor:
    with full_precision(x.device.type):
        codes, step = quantize_activations(x.float())
        return scale_sums(integer_sums(codes, weights, weight_peak), step, scale)


@torch.library.custom_op("microvlm::ternary_matmul_2x4", mutates_args=())
def ternary_matmul_2x4(x: Tensor, packed: Tensor, scale: Tensor, rows: int) -> Tensor:
    return _matmul(x, unpack_ternary(packed, rows, 4, 4), scale, 1)


@torch.library.custom_op("microvlm::ternary_matmul_3x5", mutates_args=())
def ternary_matmul_3x5(x: Tensor, packed: Tensor, scale: Tensor, rows: int) -> Tensor:
    return _matmul(x, unpack_ternary(packed, rows, 3, 5), scale, 1)


@torch.library.custom_op("microvlm::int8_matmul", mutates_args=())
def int8_matmul(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return _matmul(x, unpack_int8(packed), scale, 127)


@torch.library.custom_op("microvlm::int4_matmul", mutates_args=())
def int4_matmul(x: Tensor, packed: Tensor, multiplier: Tensor, scale: Tensor) -> Tensor:
    return _matmul(x, unpack_int4(packed, multiplier, x.shape[-1]), scale, 7 * 255)


@torch.library.custom_op("microvlm::int8_gather", mutates_args=())
def int8_gather(input_ids: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return unpack_int8(packed[input_ids]) * scale[input_ids].unsqueeze(-1)


@torch.library.custom_op("microvlm::int4_gather", mutates_args=())
def int4_gather(input_ids: Tensor, packed: Tensor, multiplier: Tensor, scale: Tensor, columns: int) -> Tensor:
    flat = input_ids.reshape(-1)
    rows = unpack_int4(packed[flat], multiplier[flat], columns) * scale[flat].unsqueeze(-1)
    return rows.reshape(*input_ids.shape, columns)


@torch.library.custom_op("microvlm::keep_last", mutates_args=())
def keep_last(hidden: Tensor, count: Tensor) -> Tensor:
    """[B, S, H] and an int64 scalar n >= 1 -> the last n positions [B, n, H]; ONNX Slice in a trace."""
    return hidden[:, -int(count) :].clone()


@ternary_matmul_2x4.register_fake
@ternary_matmul_3x5.register_fake
def _fake_ternary(x: Tensor, packed: Tensor, scale: Tensor, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@int8_matmul.register_fake
def _fake_int8(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@int4_matmul.register_fake
def _fake_int4(x: Tensor, packed: Tensor, multiplier: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@int8_gather.register_fake
def _fake_gather8(input_ids: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty((*input_ids.shape, packed.shape[1]))


@int4_gather.register_fake
def _fake_gather4(
    input_ids: Tensor, packed: Tensor, multiplier: Tensor, scale: Tensor, columns: int
) -> Tensor:
    return scale.new_empty((*input_ids.shape, columns))


@keep_last.register_fake
def _fake_keep_last(hidden: Tensor, count: Tensor) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return hidden.new_empty((hidden.shape[0], kept, hidden.shape[2]))
