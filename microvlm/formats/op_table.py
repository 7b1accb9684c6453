"""THE table of the `ai.microvlm` operators: inputs, layout, padding, scale shape, float order, and an exact numpy
reference of each. Exporter, kernels and tests read it; a changed byte layout is a new op name, never a new version.

All matrix products share one arithmetic (BitNet b1.58, Ma et al. 2024, arXiv 2402.17764, section 2), in this order,
every float step in IEEE float32 and none of them fused:

    peak  = max(max |x[m, :]|, 1e-5)                 one per token (row of x)
    codes = clip(rint(x * (127 / peak)), -128, 127)  int8, half to even
    acc   = sum over k of codes[m, k] * w[n, k]      exact int32
    y     = float(acc) * ((peak / 127) * scale[n])   the bracket first, then one multiplication an output

A token with a NaN or an infinity anywhere in it has codes 0 and a step, peak / 127, of NaN, so that each of its
outputs is NaN. Other tokens do not change for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from microvlm.formats import packing

DOMAIN = "ai.microvlm"
DOMAIN_VERSION = 1
PEAK_FLOOR = np.float32(1e-5)
CODE_MAX = np.float32(127)


@dataclass(frozen=True)
class Operand:
    name: str
    dtype: str
    shape: str
    """Symbolic: M tokens, K inputs, N outputs, R packed rows, G groups, V vocabulary, S is 1 or N."""


@dataclass(frozen=True)
class OpSpec:
    """One operator. `attributes` are ints; `kind` is what checkpoints and `lower` call this storage."""

    name: str
    kind: str
    inputs: tuple[Operand, ...]
    output: Operand
    attributes: tuple[str, ...]
    layout: str
    padding: str
    scale_shape: str
    float_order: str
    bits_per_weight: float
    reference: Callable[..., np.ndarray]

    @property
    def weight_names(self) -> tuple[str, ...]:
        return tuple(operand.name for operand in self.inputs[1:])


def quantize_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., K] -> (codes int8 [..., K], step float32 [..., 1] = peak / 127).

    A row that is not finite has codes 0 and step NaN.
    """
    finite = np.isfinite(x).all(-1, keepdims=True)
    x = np.where(finite, x, np.float32(0))
    peak = np.maximum(np.abs(x).max(-1, keepdims=True), PEAK_FLOOR).astype(np.float32)
    codes = np.clip(np.rint(x * (CODE_MAX / peak)), -128, 127).astype(np.int8)
    return codes, np.where(finite, peak / CODE_MAX, np.float32(np.nan))


def integer_sums(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """int8 [..., K] times integers [N, K] -> exact int32 [..., N]."""
    return np.matmul(codes.astype(np.int64), weights.T.astype(np.int64)).astype(np.int32)


def _scaled(x: np.ndarray, weights: np.ndarray, scale: np.ndarray) -> np.ndarray:
    codes, step = quantize_activations(x)
    return integer_sums(codes, weights).astype(np.float32) * (step * scale.astype(np.float32))


def _ternary_2x4(x: np.ndarray, packed: np.ndarray, scale: np.ndarray, *, rows: int) -> np.ndarray:
    return _scaled(x, packing.unpack_trits(packed, rows, packing.LAYOUT_2X4), scale)


def _ternary_3x5(x: np.ndarray, packed: np.ndarray, scale: np.ndarray, *, rows: int) -> np.ndarray:
    return _scaled(x, packing.unpack_trits(packed, rows, packing.LAYOUT_3X5), scale)


def _int8(x: np.ndarray, packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return _scaled(x, packing.unpack_rows_int8(packed), scale)


def _int4_weights(packed: np.ndarray, multiplier: np.ndarray, columns: int) -> np.ndarray:
    q = packing.unpack_nibbles(packed, columns).astype(np.int32)
    return q * np.repeat(multiplier.astype(np.int32), packing.GROUP, axis=1)[:, :columns]


def _int4(x: np.ndarray, packed: np.ndarray, multiplier: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return _scaled(x, _int4_weights(packed, multiplier, x.shape[-1]), scale)


def _gather8(input_ids: np.ndarray, packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return packing.unpack_rows_int8(packed[input_ids]).astype(np.float32) * scale[input_ids][..., None]


def _gather4(
    input_ids: np.ndarray, packed: np.ndarray, multiplier: np.ndarray, scale: np.ndarray, *, columns: int
) -> np.ndarray:
    flat = input_ids.reshape(-1)
    weights = _int4_weights(packed[flat], multiplier[flat], columns).astype(np.float32)
    return (weights * scale[flat][:, None]).reshape(*input_ids.shape, columns)


_X = Operand("x", "float32", "[..., K]")
_Y = Operand("y", "float32", "[..., N]")
_IDS = Operand("input_ids", "int64", "[...]")
_ROWS = Operand("y", "float32", "[..., H]")
_FLOAT_ORDER = "float(acc) * ((peak / 127) * scale)"
_GATHER_ORDER = "float(integer weight) * scale"


def _ternary(name: str, kind: str, layout: packing.TernaryLayout, reference: Callable) -> OpSpec:
    p, base = layout.rows_per_byte, layout.base
    return OpSpec(
        name=name,
        kind=kind,
        inputs=(
            _X,
            Operand("packed", "uint8", f"[R = ceil(N / {p}), K]"),
            Operand("scale", "float32", "[S]"),
        ),
        output=_Y,
        attributes=("rows",),
        layout=f"packed[r, k] = sum of (trit[p * R + r, k] + 1) * {base}^p, p < {p}",
        padding=f"N to a multiple of {p} with zero trits; attribute `rows` is N",
        scale_shape="[1] for one a tensor, [N] for one a row",
        float_order=_FLOAT_ORDER,
        bits_per_weight=8 / p,
        reference=reference,
    )


TERNARY_2X4 = _ternary("TernaryMatMul2x4", "ternary2x4", packing.LAYOUT_2X4, _ternary_2x4)
TERNARY_3X5 = _ternary("TernaryMatMul3x5", "ternary3x5", packing.LAYOUT_3X5, _ternary_3x5)
INT8_MATMUL = OpSpec(
    name="Int8MatMul",
    kind="int8",
    inputs=(_X, Operand("packed", "uint8", "[N, K]"), Operand("scale", "float32", "[N]")),
    output=_Y,
    attributes=(),
    layout="packed[n, k] = q + 128, q in -127..127",
    padding="none",
    scale_shape="[N]",
    float_order=_FLOAT_ORDER,
    bits_per_weight=8,
    reference=_int8,
)
INT4_MATMUL = OpSpec(
    name="Int4MatMul",
    kind="int4",
    inputs=(
        _X,
        Operand("packed", "uint8", "[N, Kp / 2]"),
        Operand("multiplier", "uint8", "[N, G = Kp / 32]"),
        Operand("scale", "float32", "[N]"),
    ),
    output=_Y,
    attributes=(),
    layout="packed[n, j] = (q[2j] + 8) | (q[2j + 1] + 8) << 4; weight = q * multiplier[n, k / 32]",
    padding="K to Kp, a multiple of 32, with q = 0; the codes of x are padded with 0",
    scale_shape="[N]",
    float_order=_FLOAT_ORDER,
    bits_per_weight=4 + 8 / packing.GROUP,
    reference=_int4,
)
INT8_GATHER = OpSpec(
    name="Int8Gather",
    kind="int8",
    inputs=(_IDS, Operand("packed", "uint8", "[V, H]"), Operand("scale", "float32", "[V]")),
    output=_ROWS,
    attributes=(),
    layout=INT8_MATMUL.layout,
    padding="none",
    scale_shape="[V]",
    float_order=_GATHER_ORDER,
    bits_per_weight=8,
    reference=_gather8,
)
INT4_GATHER = OpSpec(
    name="Int4Gather",
    kind="int4",
    inputs=(
        _IDS,
        Operand("packed", "uint8", "[V, Hp / 2]"),
        Operand("multiplier", "uint8", "[V, G = Hp / 32]"),
        Operand("scale", "float32", "[V]"),
    ),
    output=_ROWS,
    attributes=("columns",),
    layout=INT4_MATMUL.layout,
    padding="H to Hp, a multiple of 32; attribute `columns` is H",
    scale_shape="[V]",
    float_order=_GATHER_ORDER,
    bits_per_weight=4 + 8 / packing.GROUP,
    reference=_gather4,
)

OPS: dict[str, OpSpec] = {
    op.name: op for op in (TERNARY_2X4, TERNARY_3X5, INT8_MATMUL, INT4_MATMUL, INT8_GATHER, INT4_GATHER)
}
MATMUL_BY_KIND: dict[str, OpSpec] = {
    op.kind: op for op in (TERNARY_2X4, TERNARY_3X5, INT8_MATMUL, INT4_MATMUL)
}
TERNARY_LAYOUTS: dict[str, packing.TernaryLayout] = {
    "ternary2x4": packing.LAYOUT_2X4,
    "ternary3x5": packing.LAYOUT_3X5,
}
