"""Every variant of every product gives the exact integer sums, whatever the shape, the batch and the address."""

import itertools

import numpy as np
import pytest
from native_cases import (
    MATMULS,
    constant_operands,
    exact_sums,
    integer_weights,
    random_operands,
    reference_product,
    unaligned,
)

from microvlm.backends.native import kernel_calls, variants

pytestmark = pytest.mark.usefixtures("native_library")
by_op = pytest.mark.parametrize("op", MATMULS, ids=lambda op: op.name)


def assert_exact(op, activations_q8: np.ndarray, operands: dict[str, np.ndarray], rows: int) -> None:
    weights = integer_weights(op, operands, rows, activations_q8.shape[1])
    expected = exact_sums(activations_q8, weights)
    assert (expected == expected.astype(np.int32)).all()
    for variant in variants():
        sums = kernel_calls.multiply_q8(variant, op.name, activations_q8, rows=rows, **operands)
        np.testing.assert_array_equal(sums, expected, err_msg=variant)


@by_op
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 21, 63, 65, 130])
@pytest.mark.parametrize("columns", [1, 15, 32, 63, 64, 65, 127, 200, 257])
def test_sums_are_exact_for_any_shape(op, rows, columns):
    rng = np.random.default_rng(rows * columns)
    operands = random_operands(op, rows, columns, seed=rows + columns)
    for batch in (1, 2, 3, 5, 8, 21):
        activations_q8 = unaligned(rng.integers(-128, 128, (batch, columns)).astype(np.int8).view(np.uint8))
        assert_exact(op, activations_q8.view(np.int8), operands, rows)


@by_op
def test_sums_are_exact_for_every_batch_up_to_257(op):
    rows, columns = 37, 70
    operands = random_operands(op, rows, columns)
    activations_q8 = np.random.default_rng(1).integers(-128, 128, (257, columns)).astype(np.int8)
    expected = exact_sums(activations_q8, integer_weights(op, operands, rows, columns))
    for variant, batch in itertools.product(variants(), range(1, 258)):
        sums = kernel_calls.multiply_q8(variant, op.name, activations_q8[:batch], rows=rows, **operands)
        np.testing.assert_array_equal(sums, expected[:batch], err_msg=f"{variant}, batch {batch}")


@by_op
@pytest.mark.parametrize("shape", [(4864, 896), (896, 4864), (896, 896), (896, 128)], ids=str)
def test_sums_are_exact_at_the_shapes_of_the_full_model(op, shape):
    columns, rows = shape
    operands = random_operands(op, rows, columns)
    activations_q8 = np.random.default_rng(2).integers(-128, 128, (78, columns)).astype(np.int8)
    for batch in (1, 9, 78):
        assert_exact(op, activations_q8[:batch], operands, rows)


@by_op
@pytest.mark.parametrize("value", [127, -128])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("columns", [4864, None], ids=["4864", "largest"])
def test_the_largest_sums_are_exact(op, value, sign, columns):
    rows, columns = 9, columns or op.max_columns
    operands = constant_operands(op, rows, columns, sign)
    for batch in (1, 4, 9, 16):
        assert_exact(op, np.full((batch, columns), value, np.int8), operands, rows)


@by_op
def test_tokens_of_extremes_and_of_zeros_do_not_change_their_neighbours(op):
    rows, columns = 11, 512
    operands = random_operands(op, rows, columns)
    activations_q8 = np.stack(
        [np.full(columns, value, np.int8) for value in (127, 0, -128, 0, 1, -1, 0, 127, -128)]
    )
    assert_exact(op, activations_q8, operands, rows)


@by_op
@pytest.mark.parametrize("batch", [1, 2, 7, 33])
def test_floats_equal_the_reference_of_the_operator_table_bit_for_bit(op, batch):
    rows, columns = 100, 300
    operands, rng = random_operands(op, rows, columns), np.random.default_rng(3)
    x = rng.normal(size=(batch, columns)) * np.exp(rng.uniform(-12, 12, (batch, 1)))
    x = x.astype(np.float32)
    for count in (rows, 1):
        scale = rng.uniform(1e-3, 2, count).astype(np.float32)
        expected = reference_product(op, x, operands, scale, rows)
        for variant in variants():
            y = kernel_calls.multiply(variant, op.name, x, scale=scale, rows=rows, **operands)
            np.testing.assert_array_equal(y.view(np.int32), expected.view(np.int32), err_msg=variant)


@by_op
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("batch", [1, 9])
def test_a_token_that_is_not_finite_is_nan_and_the_others_do_not_change(op, bad, batch):
    rows, columns = 40, 100
    operands, rng = random_operands(op, rows, columns), np.random.default_rng(4)
    scale = rng.uniform(0.1, 1, rows).astype(np.float32)
    clean = rng.normal(size=(batch, columns)).astype(np.float32)
    for place in (0, 63, columns - 1):
        x = clean.copy()
        x[batch // 2, place] = bad
        expected = reference_product(op, x, operands, scale, rows)
        assert np.isnan(expected).any(1).tolist() == [m == batch // 2 for m in range(batch)]
        for variant in variants():
            y = kernel_calls.multiply(variant, op.name, x, scale=scale, rows=rows, **operands)
            np.testing.assert_array_equal(y, expected, err_msg=variant)


@by_op
def test_operands_that_do_not_fit_are_refused(op):
    operands = random_operands(op, 8, op.max_columns + 1)
    activations_q8 = np.zeros((1, op.max_columns + 1), np.int8)
    with pytest.raises(ValueError, match="too wide"):
        kernel_calls.multiply_q8("reference", op.name, activations_q8, rows=8, **operands)
    with pytest.raises(ValueError, match="x has no columns"):
        kernel_calls.multiply_q8(
            "reference", op.name, activations_q8[:, :0], rows=8, **random_operands(op, 8, 64)
        )
    with pytest.raises(ValueError, match="no such variant"):
        kernel_calls.multiply_q8("no", op.name, activations_q8, rows=8, **operands)
