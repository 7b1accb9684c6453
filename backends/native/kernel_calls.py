"""The kernels of one variant by themselves, over numpy arrays: for tests and for benchmarks without ONNX Runtime.

Operands must be of the types and sizes that are named: only their pointers reach the library, which cannot tell. It
raises ValueError for a variant or operator that it does not have and for a width that it cannot multiply exactly.
"""

from __future__ import annotations

import ctypes

import numpy as np

from microvlm.backends.native import library


def multiply(
    variant: str,
    op: str,
    x: np.ndarray,
    packed: np.ndarray,
    scale: np.ndarray,
    rows: int,
    multiplier: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """One product of `op_table`, on the calling thread: float32 x [M, K] -> float32 [M, N = rows], in `out` if given.

    `op` is the operator's name; `packed`, `multiplier` and `scale` are its operands, C-contiguous.
    """
    y = np.empty((len(x), rows), np.float32) if out is None else out
    arguments = (x, len(x), x.shape[1], packed, multiplier, scale, len(scale), rows, y)
    _call("microvlm_multiply", variant, op, *arguments)
    return y


def multiply_codes(
    variant: str,
    op: str,
    codes: np.ndarray,
    packed: np.ndarray,
    rows: int,
    multiplier: np.ndarray | None = None,
) -> np.ndarray:
    """The integer half: int8 codes [M, K] -> exact int32 sums [M, N]."""
    sums = np.empty((len(codes), rows), np.int32)
    arguments = (codes, len(codes), codes.shape[1], packed, multiplier, rows, sums)
    _call("microvlm_multiply_codes", variant, op, *arguments)
    return sums


def quantize(variant: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """One token: float32 [K] -> (codes int8 [K], step float32 [], sum of codes)."""
    codes, step, total = np.empty(len(x), np.int8), np.empty((), np.float32), np.empty((), np.int32)
    _call("microvlm_quantize", variant, x, len(x), codes, step, total)
    return codes, step, int(total)


def dequantize(
    variant: str, packed: np.ndarray, scale: float, columns: int, multiplier: np.ndarray | None = None
) -> np.ndarray:
    """One row of an int8 table, or of an int4 one with its multipliers -> float32 [columns]."""
    y = np.empty(columns, np.float32)
    _call("microvlm_dequantize", variant, packed, multiplier, columns, ctypes.c_float(scale), y)
    return y


def _call(name: str, *arguments: object) -> None:
    export = getattr(library(), name)
    export.restype = ctypes.c_char_p
    problem = export(*map(_argument, arguments))
    if problem is not None:
        raise ValueError(f"{name}: {problem.decode()}")


def _argument(value: object) -> object:
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, str):
        return value.encode()
    return ctypes.c_int64(value) if isinstance(value, int) else value
