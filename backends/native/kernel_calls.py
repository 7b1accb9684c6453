"""Calls the kernels of one variant directly, over numpy arrays: for tests and for benchmarks without ONNX Runtime.

Operands must have the dtypes and sizes given here: only their pointers reach the library, so it cannot check them.
Functions raise ValueError for an unknown variant or operator and for a width without exact 32-bit sums.
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
    """Compute a product of `op_table` on the calling thread: float32 x [M, K] -> float32 [M, N = rows], or `out`.

    `op` is the operator's name; `packed`, `multiplier` and `scale` are its operands, C-contiguous.
    """
    y = np.empty((len(x), rows), np.float32) if out is None else out
    arguments = (x, len(x), x.shape[1], packed, multiplier, scale, len(scale), rows, y)
    _call("microvlm_multiply", variant, op, *arguments)
    return y


def multiply_q8(
    variant: str,
    op: str,
    activations_q8: np.ndarray,
    packed: np.ndarray,
    rows: int,
    multiplier: np.ndarray | None = None,
) -> np.ndarray:
    """Compute the integer half of a product: int8 activations_q8 [M, K] -> exact int32 sums [M, N]."""
    sums = np.empty((len(activations_q8), rows), np.int32)
    tokens, columns = activations_q8.shape
    arguments = (activations_q8, tokens, columns, packed, multiplier, rows, sums)
    _call("microvlm_multiply_q8", variant, op, *arguments)
    return sums


def quantize(variant: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Quantise one token: float32 [K] -> (activations_q8 int8 [K], activation_scale float32 [], their sum)."""
    activations_q8, activation_scale = np.empty(len(x), np.int8), np.empty((), np.float32)
    total = np.empty((), np.int32)
    _call("microvlm_quantize", variant, x, len(x), activations_q8, activation_scale, total)
    return activations_q8, activation_scale, int(total)


def dequantize(
    variant: str, packed: np.ndarray, scale: float, columns: int, multiplier: np.ndarray | None = None
) -> np.ndarray:
    """Expand one row of an int8 table, or of an int4 table where `multiplier` is given -> float32 [columns]."""
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
