"""Byte layouts: bytes written by hand, and round trips that must be exact."""

import numpy as np
import pytest

from microvlm.formats import packing
from microvlm.formats.packing import LAYOUT_2X4, LAYOUT_3X5

LAYOUTS = [LAYOUT_2X4, LAYOUT_3X5]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 19, 20, 21])
@pytest.mark.parametrize("columns", [1, 33])
def test_trits_survive_the_round_trip_at_any_number_of_rows(layout, rows, columns):
    trits = np.random.default_rng(rows).integers(-1, 2, (rows, columns)).astype(np.int8)
    packed = packing.pack_trits(trits, layout)
    assert packed.dtype == np.uint8
    assert packed.shape == (-(-rows // layout.rows_per_byte), columns)
    assert packing.padded_rows(rows, layout) == packed.shape[0] * layout.rows_per_byte
    unpacked = packing.unpack_trits(packed, rows, layout)
    assert unpacked.dtype == np.int8
    assert np.array_equal(unpacked, trits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_byte_that_holds_trits_round_trips(layout):
    trit_codes = np.indices((3,) * layout.rows_per_byte).reshape(layout.rows_per_byte, -1)
    trits = (trit_codes - 1).astype(np.int8)
    packed = packing.pack_trits(trits, layout)
    assert packed.shape == (1, 3**layout.rows_per_byte)
    assert len(np.unique(packed)) == 3**layout.rows_per_byte
    assert np.array_equal(packing.unpack_trits(packed, layout.rows_per_byte, layout), trits)
    again = packing.pack_trits(packing.unpack_trits(packed, layout.rows_per_byte, layout), layout)
    assert np.array_equal(again, packed)


def test_base_3_uses_every_byte_up_to_242():
    packed = np.arange(243, dtype=np.uint8).reshape(1, -1)
    trits = packing.unpack_trits(packed, 5, LAYOUT_3X5)
    assert np.array_equal(packing.pack_trits(trits, LAYOUT_3X5), packed)


def test_two_bit_bytes_are_as_drawn():
    # Eight rows, so two planes' worth of bytes: byte r holds rows r, 2 + r, 4 + r and 6 + r, low bits first.
    trits = np.array([[1], [0], [-1], [1], [0], [0], [1], [-1]], np.int8)
    packed = packing.pack_trits(trits, LAYOUT_2X4)
    assert packed.tolist() == [[0b10_01_00_10], [0b00_01_10_01]]


def test_base_3_bytes_are_as_drawn():
    # Six rows pad to ten: byte r holds rows r, 2 + r, 4 + r, then padding, which is the trit code 1.
    trits = np.array([[1], [-1], [0], [1], [-1], [1]], np.int8)
    packed = packing.pack_trits(trits, LAYOUT_3X5)
    assert packed.tolist() == [[2 + 3 * 1 + 9 * 0 + 27 + 81], [0 + 3 * 2 + 9 * 2 + 27 + 81]]


@pytest.mark.parametrize("bad", [2, -2, 127, -128])
def test_packing_refuses_what_is_not_a_trit(bad):
    with pytest.raises(ValueError, match="-1, 0 and 1"):
        packing.pack_trits(np.array([[0, bad]], np.int8), LAYOUT_2X4)


def test_packing_refuses_fractions_instead_of_cutting_them():
    with pytest.raises(ValueError, match="-1, 0 and 1"):
        packing.pack_trits(np.array([[0.5, 1.0]]), LAYOUT_2X4)


def test_int8_rows_are_as_drawn():
    weight = np.array([[1.27, -1.27, 0.0, 0.01], [0.0, 0.0, 0.0, 0.0]], np.float32)
    packed, scale = packing.quantize_rows_int8(weight)
    assert packed.tolist() == [[255, 1, 128, 129], [128] * 4]
    assert scale.tolist() == [np.float32(1.27) / np.float32(127), np.float32(1e-8) / np.float32(127)]
    assert packing.unpack_rows_int8(packed).tolist() == [[127, -127, 0, 1], [0, 0, 0, 0]]


def test_every_int8_byte_unpacks_to_itself_less_128():
    packed = np.arange(256, dtype=np.uint8).reshape(1, -1)
    assert packing.unpack_rows_int8(packed).tolist() == [list(range(-128, 128))]


def test_int8_error_is_at_most_half_a_step():
    weight = np.random.default_rng(0).normal(size=(20, 300)).astype(np.float32)
    packed, scale = packing.quantize_rows_int8(weight)
    error = np.abs(packing.unpack_rows_int8(packed) * scale[:, None] - weight)
    assert (error <= 0.5001 * scale[:, None]).all()


def test_nibbles_are_as_drawn():
    q = np.array([[-7, 7, 0, 1]], np.int8)
    assert packing.pack_nibbles(q).tolist() == [[0x1 | 0xF << 4, 0x8 | 0x9 << 4]]


def test_every_nibble_byte_round_trips():
    packed = np.arange(256, dtype=np.uint8).reshape(1, -1)
    q = packing.unpack_nibbles(packed, 512)
    assert q.min() == -8
    assert q.max() == 7
    assert np.array_equal(packing.pack_nibbles(q), packed)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100, 896])
def test_int4_groups_pad_and_stay_within_half_a_step(columns):
    weight = np.random.default_rng(columns).normal(size=(9, columns)).astype(np.float32)
    packed, multiplier, scale = packing.quantize_groups_int4(weight)
    groups = -(-columns // packing.GROUP)
    assert packed.shape == (9, groups * 16)
    assert multiplier.shape == (9, groups)
    q = packing.unpack_nibbles(packed, groups * 32)
    assert np.abs(q).max() <= 7
    assert (q[:, columns:] == 0).all()
    step = np.repeat(multiplier * scale[:, None], 32, 1)[:, :columns]
    # A multiplier is at most one 255th of the row's largest step below what the group asked for.
    assert (np.abs(q[:, :columns] * step - weight) <= 0.55 * step + 1e-6).all()


def test_an_all_zero_row_or_group_stays_zero_at_four_bits():
    weight = np.zeros((2, 64), np.float32)
    weight[1, 40] = 3.0
    packed, multiplier, scale = packing.quantize_groups_int4(weight)
    q = packing.unpack_nibbles(packed, 64)
    assert multiplier.tolist() == [[0, 0], [0, 255]]
    assert np.isfinite(scale).all()
    assert np.flatnonzero(q[1]).tolist() == [40]
    assert q[1, 40] == 7
    assert not q[0].any()
