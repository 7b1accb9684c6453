"""Operands of every product for the tests of the native library: random, and at the limits of their integers."""

from __future__ import annotations

import numpy as np

from microvlm.formats import packing
from microvlm.formats.op_table import MATMUL_BY_KIND, TERNARY_LAYOUTS, OpSpec

MATMULS = list(MATMUL_BY_KIND.values())
LARGEST_COLUMNS = 65536
"""Of a row that the kernels accept; int4 sums leave 32 bits earlier, at `packing.INT4_MAX_COLUMNS`."""


def random_operands(op: OpSpec, rows: int, columns: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Operands by name, `packed` one byte off every alignment."""
    rng = np.random.default_rng(seed)
    if op.kind in TERNARY_LAYOUTS:
        trits = rng.integers(-1, 2, (rows, columns)).astype(np.int8)
        return {"packed": unaligned(packing.pack_trits(trits, TERNARY_LAYOUTS[op.kind]))}
    if op.kind == "int8":
        return {"packed": unaligned(rng.integers(0, 256, (rows, columns), np.uint8))}
    groups = -(-columns // packing.GROUP)
    q = rng.integers(-7, 8, (rows, groups * packing.GROUP)).astype(np.int8)
    q[:, columns:] = 0
    multiplier = rng.integers(0, 256, (rows, groups), np.uint8)
    return {"packed": unaligned(packing.pack_nibbles(q)), "multiplier": unaligned(multiplier)}


def constant_operands(op: OpSpec, rows: int, columns: int, sign: int) -> dict[str, np.ndarray]:
    """Every weight at its limit: trits `sign`, int8 127 * sign, int4 7 * 255 * sign."""
    if op.kind in TERNARY_LAYOUTS:
        trits = np.full((rows, columns), sign, np.int8)
        return {"packed": packing.pack_trits(trits, TERNARY_LAYOUTS[op.kind])}
    if op.kind == "int8":
        return {"packed": np.full((rows, columns), 128 + 127 * sign, np.uint8)}
    groups = -(-columns // packing.GROUP)
    q = np.full((rows, groups * packing.GROUP), 7 * sign, np.int8)
    return {"packed": packing.pack_nibbles(q), "multiplier": np.full((rows, groups), 255, np.uint8)}


def largest_columns(op: OpSpec) -> int:
    return packing.INT4_MAX_COLUMNS if op.kind == "int4" else LARGEST_COLUMNS


def integer_weights(op: OpSpec, operands: dict[str, np.ndarray], rows: int, columns: int) -> np.ndarray:
    """int64 [N, K], unpacked by `packing`."""
    packed = operands["packed"]
    if op.kind in TERNARY_LAYOUTS:
        return packing.unpack_trits(packed, rows, TERNARY_LAYOUTS[op.kind]).astype(np.int64)
    if op.kind == "int8":
        return packed.astype(np.int64) - 128
    q = packing.unpack_nibbles(packed, columns).astype(np.int64)
    return q * np.repeat(operands["multiplier"].astype(np.int64), packing.GROUP, axis=1)[:, :columns]


def exact_sums(activations_q8: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """int8 [M, K] and int64 [N, K] -> int64 [M, N]. Products below 2^53, so float64 sums them exactly."""
    return (activations_q8.astype(np.float64) @ weights.T.astype(np.float64)).astype(np.int64)


def unaligned(array: np.ndarray) -> np.ndarray:
    """The same bytes at an odd address."""
    buffer = np.empty(array.nbytes + 64, np.uint8)
    start = 1 if buffer.ctypes.data % 2 == 0 else 0
    view = buffer[start : start + array.nbytes].reshape(array.shape)
    view[...] = array
    assert view.ctypes.data % 2 == 1
    return view


def reference_product(
    op: OpSpec, x: np.ndarray, operands: dict[str, np.ndarray], scale: np.ndarray, rows: int
) -> np.ndarray:
    attributes = {"rows": rows} if "rows" in op.attributes else {}
    return op.reference(x, *operands.values(), scale, **attributes)
