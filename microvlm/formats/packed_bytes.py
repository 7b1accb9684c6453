"""Which bytes a packing writes: others are damage, and kernels and references may read them differently."""

from __future__ import annotations

from functools import cache

import numpy as np

from microvlm.formats.op_spec import OpSpec

_BYTES = 256


def is_packed(op: OpSpec, packed: np.ndarray) -> bool:
    """Whether all of `packed`, uint8 of any shape, are bytes that the packing of `op` may write."""
    return bool(_valid_bytes(op)[packed].all())


@cache
def _valid_bytes(op: OpSpec) -> np.ndarray:
    """bool [256]: the bytes whose integers are all within the storage's range, and which no other byte stands for."""
    operands = [np.arange(_BYTES, dtype=np.uint8)[None]]
    columns = _BYTES * op.columns_per_byte
    absmax = op.weight_absmax
    if op.has_multiplier:
        operands.append(np.ones((1, columns // op.group), np.uint8))
        absmax //= 255  # of the largest multiplier
    integers = op.unpack(*operands, rows=op.rows_per_byte, columns=columns)
    magnitudes = np.abs(integers.astype(np.int32)).reshape(op.rows_per_byte, _BYTES, op.columns_per_byte)
    valid = np.asarray(magnitudes.max((0, 2)) <= absmax)
    if op.trit_layout is not None:
        valid[op.trit_layout.base**op.trit_layout.rows_per_byte :] = False
    return valid
