"""Byte layouts of quantised weights, packed and unpacked in numpy. The slow reference for every faster reader.

Terms: `trits` are -1, 0, 1; `trit_codes` are trits + 1, so 0, 1, 2; `packed` are the bytes on disk; N rows, K columns.

Ternary, P rows a byte (P = 4 at base 4, P = 5 at base 3). N is padded with zero trits to Np, a multiple of P,
and the rows form P planes of R = Np / P consecutive rows:

    packed[r, k] = sum over p of trit_codes[p * R + r, k] * base^p     uint8 [R, K], K contiguous

    2x4, base 4:   bits 7-6 row 3R+r | 5-4 row 2R+r | 3-2 row R+r | 1-0 row r      2.0 bits a weight
    3x5, base 3:   c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4 <= 242                         1.6 bits a weight

Int8 by row:       packed[n, k] = q + 128, q in -127..127, scale[n] fp32; w = q * scale[n]     uint8 [N, K]

Int4, groups of 32 of one row. K is padded to Kp, a multiple of 32, with zeros:
    packed[n, j] = (q[2j] + 8) | (q[2j+1] + 8) << 4, q in -7..7                   uint8 [N, Kp/2]
    multiplier[n, g] in 1..255 (0 for an all-zero group), scale[n] fp32; w = q * multiplier[n, g] * scale[n]
    The integer multiplier makes the sum over a whole row an exact int32 (K <= 9399), so no float order matters.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

GROUP = 32
INT4_MAX_COLUMNS = (2**31 - 1) // (128 * 7 * 255)


class TernaryLayout(NamedTuple):
    """Planes of trit codes, each a digit of a byte: plane p counts base^p."""

    base: int
    rows_per_byte: int


LAYOUT_2X4 = TernaryLayout(base=4, rows_per_byte=4)
LAYOUT_3X5 = TernaryLayout(base=3, rows_per_byte=5)


def padded_rows(rows: int, layout: TernaryLayout) -> int:
    """N rounded up to whole bytes."""
    return -(-rows // layout.rows_per_byte) * layout.rows_per_byte


def pack_trits(trits: np.ndarray, layout: TernaryLayout) -> np.ndarray:
    """int8 [N, K] of -1, 0, 1 -> uint8 [Np / P, K]. Raises ValueError on any other value."""
    if trits.ndim != 2 or not np.isin(trits, (-1, 0, 1)).all():
        raise ValueError("pack_trits takes a matrix of -1, 0 and 1")
    rows, columns = trits.shape
    plane_rows = padded_rows(rows, layout) // layout.rows_per_byte
    trit_codes = np.ones((plane_rows * layout.rows_per_byte, columns), np.uint16)
    trit_codes[:rows] = trits.astype(np.int16) + 1
    powers = layout.base ** np.arange(layout.rows_per_byte, dtype=np.uint16)
    packed = (trit_codes.reshape(layout.rows_per_byte, plane_rows, columns) * powers[:, None, None]).sum(0)
    packed = packed.astype(np.uint8)
    assert packed.shape == (plane_rows, columns)
    return packed


def unpack_trits(packed: np.ndarray, rows: int, layout: TernaryLayout) -> np.ndarray:
    """uint8 [Np / P, K] -> int8 [N, K] of -1, 0, 1."""
    powers = layout.base ** np.arange(layout.rows_per_byte, dtype=np.uint16)
    trit_codes = packed[None].astype(np.uint16) // powers[:, None, None] % layout.base
    return (trit_codes.astype(np.int8) - 1).reshape(-1, packed.shape[1])[:rows]


def quantize_rows_int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, K] -> (uint8 [N, K], float32 scale [N]); symmetric, half to even, a row's absmax at 127."""
    absmax = np.maximum(np.abs(weight).max(1), np.float32(1e-8)).astype(np.float32)
    scale = (absmax / np.float32(127)).astype(np.float32)
    q = np.clip(np.rint(weight / scale[:, None]), -127, 127)
    return pack_rows_int8(q), scale


def pack_rows_int8(q: np.ndarray) -> np.ndarray:
    """Integers in -127..127 [N, K] -> uint8 [N, K]."""
    return (q.astype(np.int16) + 128).astype(np.uint8)


def unpack_rows_int8(packed: np.ndarray) -> np.ndarray:
    """uint8 [N, K] -> int8 [N, K]."""
    return (packed.astype(np.int16) - 128).astype(np.int8)


def quantize_groups_int4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [N, K] -> (uint8 [N, Kp/2], uint8 multiplier [N, Kp/32], float32 scale [N])."""
    rows = weight.shape[0]
    groups = _pad_columns(np.asarray(weight, np.float32)).reshape(rows, -1, GROUP)
    group_scale = np.abs(groups).max(2) / 7
    scale = np.maximum(group_scale.max(1) / 255, 1e-12).astype(np.float32)
    multiplier = np.clip(np.ceil(group_scale / scale[:, None] - 1e-3), 0, 255).astype(np.uint8)
    divisor = np.maximum(multiplier, 1).astype(np.float32) * scale[:, None]
    q = np.clip(np.rint(groups / divisor[:, :, None]), -7, 7).astype(np.int8).reshape(rows, -1)
    return pack_nibbles(q), multiplier, scale


def pack_groups_int4(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [N, K] of -7..7 -> (uint8 [N, Kp/2], uint8 multiplier [N, Kp/32], every one 1)."""
    padded = _pad_columns(q)
    return pack_nibbles(padded), np.ones((padded.shape[0], padded.shape[1] // GROUP), np.uint8)


def unpack_groups_int4(packed: np.ndarray, multiplier: np.ndarray, columns: int) -> np.ndarray:
    """uint8 [N, Kp/2], uint8 [N, Kp/32] -> int32 [N, K], each nibble times its group's multiplier."""
    q = unpack_nibbles(packed, columns).astype(np.int32)
    return q * np.repeat(multiplier.astype(np.int32), GROUP, axis=1)[:, :columns]


def _pad_columns(weight: np.ndarray) -> np.ndarray:
    """[N, K] -> [N, Kp], zeros from K on."""
    return np.pad(weight, ((0, 0), (0, -weight.shape[1] % GROUP)))


def pack_nibbles(q: np.ndarray) -> np.ndarray:
    """int8 [N, Kp] of -7..7 -> uint8 [N, Kp/2]."""
    nibbles = (q + 8).astype(np.uint8)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpack_nibbles(packed: np.ndarray, columns: int) -> np.ndarray:
    """uint8 [N, Kp/2] -> int8 [N, K] of -7..7."""
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)[:, :columns]
    return nibbles.astype(np.int8) - 8
