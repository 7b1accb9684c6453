"""Calls the kernels of one variant directly, over numpy arrays: for tests and for benchmarks without ONNX Runtime.

The dtype of every array is checked here and its length in the library, before anything of it is read. Functions raise
ValueError for arrays that do not fit the operator, an unknown variant or operator, and too wide an x for exact sums.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

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
    y = np.empty((len(x), _length(rows)), np.float32) if out is None else out
    bind_multiply(variant, op, x, packed, scale, rows, multiplier, y)()
    return y


def bind_multiply(
    variant: str,
    op: str,
    x: np.ndarray,
    packed: np.ndarray,
    scale: np.ndarray,
    rows: int,
    multiplier: np.ndarray | None,
    out: np.ndarray,
) -> Callable[[], None]:
    """A function that computes `multiply` of these arrays into `out` at each call, for benchmarks.

    Arguments are converted once: done at each call that takes as long as a small product.
    """
    tokens, columns = x.shape
    operands = (*_array(packed, np.uint8), *_array(multiplier, np.uint8), *_array(scale, np.float32))
    arrays = (*_array(x, np.float32), *operands, *_array(out, np.float32))
    arguments = tuple(map(_argument, (variant, op, tokens, rows, columns, *arrays)))
    export = _export("microvlm_multiply")
    kept = (x, packed, multiplier, scale, out)

    def multiply_again() -> None:
        _raise_problem("microvlm_multiply", export(*arguments), kept)

    return multiply_again


def multiply_q8(
    variant: str,
    op: str,
    activations_q8: np.ndarray,
    packed: np.ndarray,
    rows: int,
    multiplier: np.ndarray | None = None,
) -> np.ndarray:
    """Compute the integer half of a product: int8 activations_q8 [M, K] -> exact int32 sums [M, N]."""
    tokens, columns = activations_q8.shape
    sums = np.empty((tokens, _length(rows)), np.int32)
    operands = (*_array(packed, np.uint8), *_array(multiplier, np.uint8))
    arguments = (*_array(activations_q8, np.int8), *operands, *_array(sums, np.int32))
    _call("microvlm_multiply_q8", variant, op, tokens, rows, columns, *arguments)
    return sums


def quantize(variant: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Quantise one token: float32 [K] -> (activations_q8 int8 [K], activation_scale float32 [], their sum)."""
    activations_q8, activation_scale = np.empty(x.size, np.int8), np.empty((), np.float32)
    total = np.empty((), np.int32)
    arrays = (*_array(x, np.float32), *_array(activations_q8, np.int8))
    _call("microvlm_quantize", variant, *arrays, _pointer(activation_scale), _pointer(total))
    return activations_q8, activation_scale, int(total)


def dequantize(
    variant: str, packed: np.ndarray, scale: float, columns: int, multiplier: np.ndarray | None = None
) -> np.ndarray:
    """Expand one row of an int8 table, or of an int4 table where `multiplier` is given -> float32 [columns]."""
    y = np.empty(_length(columns), np.float32)
    operands = (*_array(packed, np.uint8), *_array(multiplier, np.uint8))
    _call("microvlm_dequantize", variant, *operands, ctypes.c_float(scale), *_array(y, np.float32))
    return y


def _call(name: str, *arguments: object) -> None:
    _raise_problem(name, _export(name)(*map(_argument, arguments)))


def _export(name: str) -> Callable[..., bytes | None]:
    export = getattr(library(), name)
    export.restype = ctypes.c_char_p
    return export


def _raise_problem(name: str, problem: bytes | None, _kept: object = None) -> None:
    """Raise ValueError for the library's sentence. `_kept`: arrays that had to live until the call returned."""
    if problem is not None:
        raise ValueError(f"{name}: {problem.decode()}")


def _argument(value: object) -> object:
    if isinstance(value, str):
        return value.encode()
    return ctypes.c_int64(value) if isinstance(value, int) else value


def _array(array: np.ndarray | None, dtype: type[np.generic]) -> tuple[object, int]:
    """An array's pointer and length in bytes; null and 0 for None. Raises ValueError."""
    if array is None:
        return ctypes.c_void_p(None), 0
    if array.dtype != dtype or not array.flags.c_contiguous or array.ctypes.data % array.itemsize:
        raise ValueError(f"an operand must be a contiguous, aligned array of {np.dtype(dtype).name}")
    return _pointer(array), array.nbytes


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _length(count: int) -> int:
    """A length that numpy can allocate; the library refuses what is wrong with others."""
    return max(count, 0)
