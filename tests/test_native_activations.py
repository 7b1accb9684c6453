"""Activation codes, and rows of quantised tables, are the table's in every variant, bit for bit."""

import numpy as np
import pytest

from microvlm.backends.native import kernel_calls, variants
from microvlm.formats import op_table, packing
from microvlm.formats.op_table import INT4_GATHER, INT8_GATHER

pytestmark = pytest.mark.usefixtures("native_library")


def assert_codes_of_the_table(x: np.ndarray) -> None:
    codes, step = op_table.quantize_activations(x)
    for variant in variants():
        for row, expected, expected_step in zip(x, codes, step, strict=True):
            got, got_step, total = kernel_calls.quantize(variant, row)
            np.testing.assert_array_equal(got, expected, err_msg=variant)
            np.testing.assert_array_equal(got_step, expected_step[0], err_msg=variant)
            assert total == expected.sum(dtype=np.int64)


@pytest.mark.parametrize("columns", [1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 100, 896])
def test_codes_of_any_width_and_size(columns):
    rng = np.random.default_rng(columns)
    x = rng.normal(size=(200, columns)) * np.exp(rng.uniform(-20, 20, (200, 1)))
    assert_codes_of_the_table(x.astype(np.float32))


def test_codes_at_ties_and_a_last_bit_beside_them():
    peaks = np.random.default_rng(0).uniform(0.5, 2, 500).astype(np.float32)
    halves = np.arange(-126.5, 127, 8, dtype=np.float32)
    x = (halves[None] / (np.float32(127) / peaks[:, None])).astype(np.float32)
    around = [x, np.nextafter(x, np.float32(9)), np.nextafter(x, np.float32(-9)), peaks[:, None]]
    assert_codes_of_the_table(np.concatenate(around, 1))


def test_codes_of_extremes():
    largest, tiny = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
    rows = [np.zeros(40), np.full(40, 1e-5), np.full(40, tiny), np.full(40, largest), np.full(40, -largest)]
    rows += [np.r_[largest, np.full(39, tiny)], np.r_[-127, np.arange(39) + 0.5]]
    assert_codes_of_the_table(np.stack(rows).astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("columns", [1, 16, 33, 100])
def test_a_token_that_is_not_finite_has_no_codes(bad, columns):
    x = np.random.default_rng(1).normal(size=(3, columns)).astype(np.float32)
    x[0, 0] = x[1, columns // 2] = x[2, -1] = bad
    codes, step = op_table.quantize_activations(x)
    assert not codes.any()
    assert np.isnan(step).all()
    assert_codes_of_the_table(x)


@pytest.mark.parametrize("columns", [1, 8, 31, 32, 33, 100, 896])
def test_rows_of_tables(columns):
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(12, columns)).astype(np.float32)
    ids = np.arange(12)
    packed, scale = packing.quantize_rows_int8(weight)
    nibbles, multiplier, scale4 = packing.quantize_groups_int4(weight)
    wide = INT8_GATHER.reference(ids, packed, scale)
    narrow = INT4_GATHER.reference(ids, nibbles, multiplier, scale4, columns=columns)
    for variant in variants():
        for n in ids:
            got = kernel_calls.dequantize(variant, packed[n], scale[n], columns)
            np.testing.assert_array_equal(got.view(np.int32), wide[n].view(np.int32), err_msg=variant)
            got = kernel_calls.dequantize(variant, nibbles[n], scale4[n], columns, multiplier[n])
            np.testing.assert_array_equal(got.view(np.int32), narrow[n].view(np.int32), err_msg=variant)
