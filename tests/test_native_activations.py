"""Int8 activations and expanded rows of quantised tables equal the operator table's in every variant, bit for bit."""

import numpy as np
import pytest

from microvlm.backends.native import kernel_calls, variants
from microvlm.formats import op_spec, packing
from microvlm.formats.op_table import INT4_GATHER, INT8_GATHER

pytestmark = pytest.mark.usefixtures("native_library")


def assert_equal_to_the_operator_table(x: np.ndarray) -> None:
    activations_q8, activation_scale = op_spec.quantize_activations(x)
    for variant in variants():
        for row, expected, expected_scale in zip(x, activations_q8, activation_scale, strict=True):
            values, scale, total = kernel_calls.quantize(variant, row)
            np.testing.assert_array_equal(values, expected, err_msg=variant)
            np.testing.assert_array_equal(scale, expected_scale[0], err_msg=variant)
            assert total == expected.sum(dtype=np.int64)


@pytest.mark.parametrize("columns", [1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 100, 896])
def test_activations_of_any_width_and_size_equal_the_operator_table(columns):
    rng = np.random.default_rng(columns)
    x = rng.normal(size=(200, columns)) * np.exp(rng.uniform(-20, 20, (200, 1)))
    assert_equal_to_the_operator_table(x.astype(np.float32))


def test_activations_at_ties_and_one_bit_beside_them_equal_the_operator_table():
    absmax = np.random.default_rng(0).uniform(0.5, 2, 500).astype(np.float32)
    halves = np.arange(-126.5, 127, 8, dtype=np.float32)
    x = (halves[None] / (np.float32(127) / absmax[:, None])).astype(np.float32)
    around = [x, np.nextafter(x, np.float32(9)), np.nextafter(x, np.float32(-9)), absmax[:, None]]
    assert_equal_to_the_operator_table(np.concatenate(around, 1))


def test_extreme_activations_equal_the_operator_table():
    largest, tiny = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
    rows = [np.zeros(40), np.full(40, 1e-5), np.full(40, tiny), np.full(40, largest), np.full(40, -largest)]
    rows += [np.r_[largest, np.full(39, tiny)], np.r_[-127, np.arange(39) + 0.5]]
    assert_equal_to_the_operator_table(np.stack(rows).astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("columns", [1, 16, 33, 100])
def test_a_token_that_is_not_finite_quantises_to_zeros_with_a_nan_scale(bad, columns):
    x = np.random.default_rng(1).normal(size=(3, columns)).astype(np.float32)
    x[0, 0] = x[1, columns // 2] = x[2, -1] = bad
    activations_q8, activation_scale = op_spec.quantize_activations(x)
    assert not activations_q8.any()
    assert np.isnan(activation_scale).all()
    assert_equal_to_the_operator_table(x)


@pytest.mark.parametrize("columns", [1, 8, 31, 32, 33, 100, 896])
def test_expanded_rows_equal_the_operator_table(columns):
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(12, columns)).astype(np.float32)
    ids = np.arange(12)
    packed, scale = packing.quantize_rows_int8(weight)
    nibbles, multiplier, scale4 = packing.quantize_groups_int4(weight)
    wide = INT8_GATHER.reference(ids, packed, scale)
    narrow = INT4_GATHER.reference(ids, nibbles, multiplier, scale4, columns=columns)
    for variant in variants():
        for n in ids:
            row = kernel_calls.dequantize(variant, packed[n], scale[n], columns)
            np.testing.assert_array_equal(row.view(np.int32), wide[n].view(np.int32), err_msg=variant)
            row = kernel_calls.dequantize(variant, nibbles[n], scale4[n], columns, multiplier[n])
            np.testing.assert_array_equal(row.view(np.int32), narrow[n].view(np.int32), err_msg=variant)
