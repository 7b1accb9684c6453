"""Operands of every product for the tests of the native library: random, and at the limits of their integers."""

from __future__ import annotations

import numpy as np

from microvlm.formats import packing
from microvlm.formats.op_spec import OpSpec
from microvlm.formats.op_table import MATMUL_BY_KIND

MATMULS = list(MATMUL_BY_KIND.values())


def random_operands(op: OpSpec, rows: int, columns: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Operands by name, `packed` one byte off every alignment."""
    rng = np.random.default_rng(seed)
    if op.is_ternary:
        trits = rng.integers(-1, 2, (rows, columns)).astype(np.int8)
        return {"packed": unaligned(*op.pack(trits))}
    if op.kind == "int8":
        return {"packed": unaligned(rng.integers(0, 256, (rows, columns), np.uint8))}
    groups = -(-columns // packing.GROUP)
    q = rng.integers(-7, 8, (rows, groups * packing.GROUP)).astype(np.int8)
    q[:, columns:] = 0
    multiplier = rng.integers(0, 256, (rows, groups), np.uint8)
    return {"packed": unaligned(packing.pack_nibbles(q)), "multiplier": unaligned(multiplier)}


def constant_operands(op: OpSpec, rows: int, columns: int, sign: int) -> dict[str, np.ndarray]:
    """Every weight at its limit: trits `sign`, int8 127 * sign, int4 7 * 255 * sign."""
    largest = 7 if op.has_multiplier else op.weight_absmax
    operands = op.pack(np.full((rows, columns), largest * sign, np.int8))
    operands_by_name = dict(zip(op.weight_names[:-1], operands, strict=True))
    if op.has_multiplier:
        operands_by_name["multiplier"] = np.full_like(operands_by_name["multiplier"], 255)
    return operands_by_name


def integer_weights(op: OpSpec, operands: dict[str, np.ndarray], rows: int, columns: int) -> np.ndarray:
    """int64 [N, K], unpacked by `packing`."""
    return op.unpack(*operands.values(), rows=rows, columns=columns).astype(np.int64)


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
