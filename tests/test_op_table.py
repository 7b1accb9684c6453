"""Every operator of the table: numpy reference, eager torch and the torch op give the same bits."""

import numpy as np
import pytest
import torch

from microvlm.formats import op_spec
from microvlm.formats.op_table import (
    INT4_GATHER,
    INT4_MATMUL,
    INT8_GATHER,
    INT8_MATMUL,
    MATMUL_BY_KIND,
    TERNARY_2X4,
    TERNARY_3X5,
)
from microvlm.model import torch_ops
from microvlm.model.linear import PackedLinear

MATMULS = list(MATMUL_BY_KIND.values())
TERNARY = [op for op in MATMULS if op.is_ternary]


def weights_of(op, rows: int, columns: int, seed: int = 0, per_row: bool = True) -> dict[str, np.ndarray]:
    """Random operands of `op` by name."""
    rng = np.random.default_rng(seed)
    if op.is_ternary:
        trits = rng.integers(-1, 2, (rows, columns)).astype(np.int8)
        scale = rng.uniform(0.01, 2, rows if per_row else 1).astype(np.float32)
        return dict(zip(op.weight_names, (*op.pack(trits), scale), strict=True))
    weight = rng.normal(size=(rows, columns)).astype(np.float32)
    return dict(zip(op.weight_names, op.quantize(weight), strict=True))


def reference(op, x: np.ndarray, weights: dict[str, np.ndarray], rows: int) -> np.ndarray:
    attributes = {"rows": rows} if "rows" in op.attributes else {}
    return op.reference(x, *(weights[name] for name in op.weight_names), **attributes)


def packed_linear(op, weights: dict[str, np.ndarray], rows: int, columns: int) -> PackedLinear:
    return PackedLinear(op.kind, rows, columns, {k: torch.from_numpy(v) for k, v in weights.items()}, None)


def assert_all_three_equal(op, x: np.ndarray, weights: dict[str, np.ndarray], rows: int) -> None:
    expected = torch.from_numpy(reference(op, x, weights, rows))
    layer = packed_linear(op, weights, rows, x.shape[-1])
    assert torch.equal(layer(torch.from_numpy(x)), expected)
    layer.traced = True
    assert torch.equal(layer(torch.from_numpy(x)), expected)


@pytest.mark.parametrize("op", MATMULS, ids=lambda op: op.name)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (4, 8), (5, 31), (7, 64), (19, 100), (33, 896), (20, 1100)]
)
def test_numpy_and_torch_agree_on_every_bit(op, rows, columns):
    x = np.random.default_rng(1).normal(size=(2, 3, columns)).astype(np.float32)
    assert_all_three_equal(op, x, weights_of(op, rows, columns), rows)


@pytest.mark.parametrize("op", TERNARY, ids=lambda op: op.name)
def test_one_scale_a_tensor_broadcasts(op):
    x = np.random.default_rng(1).normal(size=(3, 40)).astype(np.float32)
    assert_all_three_equal(op, x, weights_of(op, 9, 40, per_row=False), 9)


def test_int8_activations_agree_on_every_bit_over_many_rows_and_sizes():
    x = np.random.default_rng(2).normal(size=(4000, 96)).astype(np.float32)
    x *= np.exp(np.random.default_rng(3).uniform(-20, 20, (4000, 1))).astype(np.float32)
    activations_q8, activation_scale = op_spec.quantize_activations(x)
    torch_q8, torch_scale = torch_ops.quantize_activations(torch.from_numpy(x))
    assert np.array_equal(torch_q8.numpy(), activations_q8)
    assert np.array_equal(torch_scale.numpy(), activation_scale)


def test_the_activation_factor_is_one_division_and_not_a_rounded_reciprocal():
    # Values a last bit either side of a tie, where a rounded reciprocal turns the integer over.
    absmaxes = np.random.default_rng(4).uniform(0.5, 2, 20_000).astype(np.float32)
    ties = (np.float32(0.5) / (np.float32(127) / absmaxes)).astype(np.float32)
    x = np.stack([absmaxes, ties, np.nextafter(ties, np.float32(9)), np.nextafter(ties, np.float32(0))], 1)
    activations_q8, _ = op_spec.quantize_activations(x)
    assert np.array_equal(torch_ops.quantize_activations(torch.from_numpy(x))[0].numpy(), activations_q8)


def test_int8_activations_round_half_to_even_and_reach_127():
    x = np.array([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]], np.float32)
    activations_q8, activation_scale = op_spec.quantize_activations(x)
    assert activations_q8.tolist() == [[127, -127, 0, 2, 2, 0, -2, -2]]
    assert activation_scale.tolist() == [[1.0]]
    assert torch_ops.quantize_activations(torch.from_numpy(x))[0].tolist() == activations_q8.tolist()


def test_a_token_of_zeros_gives_zeros():
    for op in MATMULS:
        weights = weights_of(op, 6, 40)
        assert not reference(op, np.zeros((2, 40), np.float32), weights, 6).any()
        assert not packed_linear(op, weights, 6, 40)(torch.zeros(2, 40)).any()


@pytest.mark.parametrize("op", TERNARY, ids=lambda op: op.name)
@pytest.mark.parametrize("columns", [4864, 8960])
@pytest.mark.parametrize(("trit", "activation"), [(1, 127), (-1, -128), (1, -128), (-1, 127)])
def test_the_largest_ternary_sums_are_exact(op, columns, trit, activation):
    rows = 6
    trits = np.full((rows, columns), trit, np.int8)
    sums = op_spec.integer_sums(np.full((1, columns), activation, np.int8), trits)
    assert (sums == trit * activation * columns).all()
    packed = op.pack(trits)[0]
    layer = packed_linear(op, {"packed": packed, "scale": np.ones(1, np.float32)}, rows, columns)
    torch_sums = torch_ops.integer_sums(
        torch.full((1, columns), float(activation)), layer.integers(), layer.op.weight_absmax
    )
    assert (torch_sums.long().numpy() == sums).all()


@pytest.mark.parametrize("columns", [4864, 8960])
@pytest.mark.parametrize(
    ("op", "weight_absmax"), [(INT8_MATMUL, 127), (INT4_MATMUL, 7 * 255)], ids=["int8", "int4"]
)
def test_the_largest_wider_sums_stay_inside_32_bits(op, weight_absmax, columns):
    weights = np.full((1, columns), weight_absmax, np.int64)
    activations_q8 = np.full((1, columns), -128, np.int8)
    assert abs((activations_q8.astype(np.int64) @ weights.T).item()) < 2**31
    sums = op_spec.integer_sums(activations_q8, weights)
    assert sums.item() == -128 * weight_absmax * columns
    torch_sums = torch_ops.integer_sums(
        torch.full((1, columns), -128.0), torch.from_numpy(weights).float(), weight_absmax
    )
    assert torch_sums.item() == np.float32(sums.item())


def test_odd_sums_above_24_bits_round_once_and_to_even():
    # 2^24 + 1 is not a float: exact sums first, then one rounding, in numpy as in torch.
    columns, rows = 1100, 3
    rng = np.random.default_rng(5)
    weights = rng.integers(100, 128, (rows, columns))
    activations_q8 = rng.integers(100, 128, (7, columns)).astype(np.int8)
    exact = op_spec.integer_sums(activations_q8, weights)
    assert (exact > 2**23).all()
    sums = torch_ops.integer_sums(
        torch.from_numpy(activations_q8).float(), torch.from_numpy(weights).float(), 127
    )
    assert np.array_equal(sums.numpy(), exact.astype(np.float32))


@pytest.mark.parametrize("op", [INT8_GATHER, INT4_GATHER], ids=lambda op: op.name)
@pytest.mark.parametrize("columns", [32, 40, 64])
def test_gathers_agree_on_every_bit(op, columns):
    weights = weights_of(op, 50, columns)
    ids = np.random.default_rng(6).integers(0, 50, (2, 7))
    operands = [weights[name] for name in op.weight_names]
    attributes = {"columns": columns} if "columns" in op.attributes else {}
    expected = op.reference(ids, *operands, **attributes)
    tensors = {name: torch.from_numpy(weights[name]) for name in op.weight_names}
    actual = torch_ops.call(op, torch.from_numpy(ids), tensors, rows=50, columns=columns)
    assert expected.shape == (2, 7, columns)
    assert np.array_equal(actual.numpy(), expected)


def test_every_operator_has_a_fake_that_tells_its_shape():
    for op in MATMULS:
        layer = packed_linear(op, weights_of(op, 7, 40), 7, 40)
        layer.traced = True
        program = torch.export.export(layer, (torch.zeros(2, 3, 40),), strict=False)
        names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert len([name for name in names if name.startswith("microvlm.")]) == 1
        assert program.module()(torch.zeros(2, 3, 40)).shape == (2, 3, 7)


def test_the_table_says_its_bits_per_weight():
    assert [op.bits_per_weight for op in (TERNARY_2X4, TERNARY_3X5, INT8_MATMUL, INT4_MATMUL)] == [
        2,
        1.6,
        8,
        4.25,
    ]
    for op in MATMULS:
        rows, columns = 640, 320
        arrays = weights_of(op, rows, columns, per_row=False)
        byte_count = sum(array.nbytes for name, array in arrays.items() if name != "scale")
        assert byte_count * 8 / (rows * columns) == op.bits_per_weight


@pytest.mark.parametrize("op", MATMULS, ids=lambda op: op.name)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_is_nan_in_numpy_and_in_torch_and_the_others_do_not_change(op, bad):
    weights = weights_of(op, 9, 40)
    x = np.random.default_rng(7).normal(size=(4, 40)).astype(np.float32)
    clean = reference(op, x, weights, 9)
    x[1, 0] = x[3, 39] = bad
    actual = reference(op, x, weights, 9)
    assert np.isnan(actual[[1, 3]]).all()
    assert np.array_equal(actual[[0, 2]], clean[[0, 2]])
    layer = packed_linear(op, weights, 9, 40)
    for layer.traced in (False, True):
        np.testing.assert_array_equal(layer(torch.from_numpy(x)).numpy(), actual)
