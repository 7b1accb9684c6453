"""Ternary linears: the definition, the straight-through gradients, transformers' layer, and packed == trained."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from microvlm.formats.op_spec import quantize_activations
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.embedding import TiedEmbedding
from microvlm.model.linear import (
    DenseTritLinear,
    Int8Linear,
    PackedLinear,
    TernaryLinear,
    int8_rows,
    linear_factory,
    ternarize,
    weights_rounded_once,
)
from microvlm.model.lowering import INTEGER_BY_BITS, quantize_linear, store_trits
from microvlm.model.torch_ops import int8_sums

FORMATS = [
    WeightFormat(1.58, "2bit"),
    WeightFormat(1.58, "base3"),
    WeightFormat(4),
    WeightFormat(8),
    WeightFormat(16),
    WeightFormat(32),
]


def ternary_layer(columns: int = 50, rows: int = 23, bias: bool = True) -> TernaryLinear:
    torch.manual_seed(columns)
    return TernaryLinear(columns, rows, bias=bias)


def packed_of(layer: TernaryLinear, weights: WeightFormat = FORMATS[0]) -> nn.Module:
    with torch.no_grad():
        return store_trits(*ternarize(layer.weight), layer.bias, weights)


def test_trits_are_the_definition_of_bitnet():
    # The mean of |W| is exactly 0.5; a quarter is half a scale, and half rounds to even, to 0.
    weight = torch.tensor([[1.0, -1.0, 0.25], [0.5, -0.25, 0.0]])
    trits, scale = ternarize(weight)
    assert scale.tolist() == [0.5]
    assert trits.tolist() == [[1, -1, 0], [1, 0, 0]]


def test_a_weight_of_zeros_has_a_scale_and_no_trits():
    trits, scale = ternarize(torch.zeros(3, 4))
    assert not trits.any()
    assert scale.item() == pytest.approx(1e-5)


def test_the_forward_is_activations_times_trits_times_scales():
    layer = ternary_layer()
    x = torch.randn(7, 50)
    activations_q8, activation_scale = quantize_activations(x.numpy())
    trits, scale = ternarize(layer.weight)
    sums = activations_q8.astype(np.int64) @ trits.detach().numpy().astype(np.int64).T
    expected = sums.astype(np.float32) * (activation_scale * scale.numpy()) + layer.bias.detach().numpy()
    assert np.array_equal(layer(x).detach().numpy(), expected)


@pytest.mark.parametrize("weights", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(50, 23), (64, 20), (33, 1), (1100, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_stored_trits_compute_what_was_trained_bit_for_bit(weights, shape, bias):
    layer = ternary_layer(*shape, bias=bias)
    x = torch.randn(2, 3, shape[0])
    stored = packed_of(layer, weights)
    with torch.no_grad():
        assert torch.equal(stored(x), layer(x))


def test_int8_training_and_storage_are_the_same_function():
    torch.manual_seed(0)
    for columns in (40, 1100):
        layer = Int8Linear(columns, 31)
        with torch.no_grad():
            layer.weight[3] = 0
        stored = quantize_linear(INTEGER_BY_BITS[8], layer.weight, layer.bias.detach())
        integers, scale = int8_rows(layer.weight)
        assert torch.equal(stored.integers(), integers.detach())
        assert torch.equal(stored.scale, scale)
        x = torch.randn(5, columns)
        assert torch.equal(stored(x), layer(x).detach())


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_of_transformers_agrees_to_float_tolerance(bias, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    with torch.compiler.set_stance("force_eager"):
        bitnet = pytest.importorskip("transformers.integrations.bitnet")
        ours = ternary_layer(96, 40, bias=bias)
        theirs = bitnet.AutoBitLinear(96, 40, bias=bias, online_quant=True)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(4, 9, 96)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        ours(x).square().sum().backward()
        theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)


def dequantised(layer: nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors a straight-through estimator differentiates as if they had not been rounded."""
    activations_q8, activation_scale = quantize_activations(x.detach().numpy())
    rounded_x = torch.from_numpy(activations_q8.astype(np.float32) * activation_scale)
    integers, scale = (ternarize if layer.kind == "ternary" else int8_rows)(layer.weight.detach())
    return rounded_x, integers * (scale[:, None] if layer.kind == "int8" else scale)


@pytest.mark.parametrize("kind", [TernaryLinear, Int8Linear])
def test_gradients_go_straight_through_both_quantisers(kind):
    torch.manual_seed(1)
    layer = kind(30, 11)
    x = torch.randn(2, 4, 30, requires_grad=True)
    upstream = torch.randn(2, 4, 11)
    layer(x).backward(upstream)
    rounded_x, rounded_weight = dequantised(layer, x)
    rounded_x.requires_grad_()
    rounded_weight.requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    torch.nn.functional.linear(rounded_x, rounded_weight, bias).backward(upstream)
    torch.testing.assert_close(x.grad, rounded_x.grad)
    torch.testing.assert_close(layer.weight.grad, rounded_weight.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)


def test_training_moves_latent_weights_across_a_rounding_edge():
    torch.manual_seed(2)
    layer = TernaryLinear(16, 4, bias=False)
    target, x = torch.randn(32, 4), torch.randn(32, 16)
    before, start = ternarize(layer.weight.detach())[0], (layer(x) - target).square().mean().item()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert not torch.equal(ternarize(layer.weight.detach())[0], before)
    assert loss.item() < start


def test_a_weight_is_rounded_once_where_it_is_in_several_products_and_anew_afterwards(monkeypatch):
    layer, calls = ternary_layer(), []
    x = torch.randn(4, layer.in_features)
    expected = layer(x)
    monkeypatch.setattr(
        "microvlm.model.linear.ternarize", lambda weight: calls.append(1) or ternarize(weight)
    )
    with weights_rounded_once():
        (layer(x) + layer(2 * x)).sum().backward()
        assert len(calls) == 1
        assert torch.equal(layer(x), expected)
    with torch.no_grad():
        layer.weight.neg_()
    with weights_rounded_once():
        changed = layer(x)
    assert len(calls) == 2
    bias = 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(changed - bias, bias - expected)


def test_a_packed_layer_stays_exact_inside_autocast():
    layer = packed_of(ternary_layer(512, 16))
    x = torch.randn(3, 512)
    for stored in (layer, packed_of(ternary_layer(512, 16), FORMATS[4])):
        expected = stored(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(stored(x), expected)
    layer.traced = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_unpacked_integers_do_not_leak_into_copies_or_state():
    layer = packed_of(ternary_layer())
    layer(torch.randn(1, 50))
    layer.tap = lambda activations_q8: activations_q8
    assert layer._integers is not None
    assert set(layer.state_dict()) == {"packed", "scale", "bias"}
    twin = copy.deepcopy(layer)
    assert twin._integers is None
    assert twin.tap is None
    x = torch.randn(2, 50)
    assert torch.equal(twin(x), layer(x))


def test_loading_other_weights_forgets_the_unpacked_ones():
    layer, other = packed_of(ternary_layer()), packed_of(ternary_layer())
    with torch.no_grad():
        other.packed.fill_(0b01_10_00_01)
    x = torch.randn(2, 50)
    first = layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(layer(x), first)


def test_integers_unpacked_in_inference_mode_serve_gradients_later():
    layer = packed_of(ternary_layer())
    with torch.inference_mode():
        layer(torch.randn(2, 50))
    assert not layer.integers().is_inference()
    weight = torch.randn(50, 50, requires_grad=True)
    layer(torch.randn(2, 50) @ weight).sum().backward()
    assert weight.grad.isfinite().all()


def test_a_tap_receives_the_activations_and_replaces_them():
    layer = packed_of(ternary_layer(bias=False))
    x = torch.randn(2, 50)
    tapped_activations, sums = [], []

    def record(activations_q8: torch.Tensor) -> torch.Tensor:
        tapped_activations.append(activations_q8.clone())
        return torch.zeros_like(activations_q8)

    layer.tap, layer.sums_tap = record, sums.append
    assert not layer(x).any()
    assert np.array_equal(tapped_activations[0].numpy(), quantize_activations(x.numpy())[0])
    assert not sums[0].any()


def test_the_factory_gives_each_width_its_layer():
    kinds = [type(linear_factory(bits)(8, 4, True)) for bits in (32, 8, 1.58)]
    assert kinds == [nn.Linear, Int8Linear, TernaryLinear]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_cuda_computes_the_same_bits(weights):
    layer = ternary_layer(1100, 37)
    x = torch.randn(9, 1100)
    stored = packed_of(layer, weights)
    expected = stored(x)
    assert torch.equal(stored.cuda()(x.cuda()).cpu(), expected)
    # The mean of |W| is summed in another order there, so the scale may differ by its last bit.
    torch.testing.assert_close(layer.cuda()(x.cuda()).detach().cpu(), expected)
    assert torch.equal(stored.cpu()(x), expected)
    assert isinstance(stored, PackedLinear | DenseTritLinear)


def both_paths(monkeypatch, function):
    """What `function` returns with int8 products and with float32 ones."""
    results = []
    for is_int8 in (True, False):
        monkeypatch.setattr("microvlm.model.torch_ops.multiplies_int8", lambda _, value=is_int8: value)
        results.append(function())
    return results


@pytest.mark.parametrize("kind", [TernaryLinear, Int8Linear])
@pytest.mark.parametrize("columns", [33, 1100])
@pytest.mark.parametrize("autocast", [False, True])
def test_int8_products_train_what_float_products_train_bit_for_bit(kind, columns, autocast, monkeypatch):
    def train():
        torch.manual_seed(2)
        layer = kind(columns, 24)
        x = torch.randn(2, 5, columns, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), weights_rounded_once():
            y = layer(x) + layer(x * 2)
        y.square().sum().backward()
        return y.detach(), x.grad, layer.weight.grad

    for integer, floating in zip(*both_paths(monkeypatch, train), strict=True):
        assert torch.equal(integer, floating)


def test_the_largest_integers_do_not_saturate_in_int8_products():
    activations, weights = (torch.full(shape, -128, dtype=torch.int8) for shape in ((3, 4096), (5, 4096)))
    assert torch.equal(
        int8_sums(activations, weights), torch.full((3, 5), 128 * 128 * 4096, dtype=torch.int32)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_nan_on_both_paths_and_spoils_no_other(bad, monkeypatch):
    layer = ternary_layer()
    x = torch.randn(3, 50)
    x[1, 7] = bad
    for y in both_paths(monkeypatch, lambda: layer(x)):
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


def test_an_input_is_rounded_again_after_it_was_changed():
    layer = ternary_layer()
    x = torch.randn(3, 50)
    with weights_rounded_once(), torch.no_grad():
        before = layer(x)
        assert torch.equal(layer(x), before)
        x.mul_(-1)
        after = layer(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, layer(x.clone()).detach())


def test_a_frozen_ternary_weight_gets_no_gradient_and_its_input_gets_the_same():
    x = torch.randn(4, 50, requires_grad=True)
    layer = ternary_layer()
    layer(x).square().sum().backward()
    expected = x.grad
    x.grad = None
    layer.weight.requires_grad_(False)
    layer.weight.grad = None
    layer(x).square().sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(x.grad, expected)


def test_an_eight_bit_lookup_is_that_of_the_whole_rounded_table():
    torch.manual_seed(0)
    embedding = TiedEmbedding(40, 16, 8)
    ids = torch.randint(40, (2, 9))
    y = embedding.embed(ids)
    integers, scale = int8_rows(embedding.weight)
    table = embedding.weight + (integers * scale[:, None] - embedding.weight).detach()
    assert torch.equal(y, torch.nn.functional.embedding(ids, table))
    y.square().sum().backward()
    gradient = embedding.weight.grad.clone()
    embedding.weight.grad = None
    torch.nn.functional.embedding(ids, table).square().sum().backward()
    assert torch.equal(embedding.weight.grad, gradient)
