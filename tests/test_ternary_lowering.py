"""Lowering a model to storage formats: trits survive any width, and post-training rounding behaves."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import FLOAT, TERNARY, seeded_model, tiny_config

from microvlm.errors import UserError
from microvlm.formats import packing
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.embedding import HalfEmbedding, PackedEmbedding
from microvlm.model.linear import DenseTritLinear, HalfLinear, PackedLinear, TernaryLinear, ternarize
from microvlm.model.lowering import (
    INTEGER_BY_BITS,
    _least_squares_trits,
    lower,
    named_packed,
    quantize_linear,
    set_traced,
    ternary_trained,
)
from microvlm.model.microvlm import MicroVLM
from microvlm.presets import preset

WIDTHS = [WeightFormat(bits, packing) for bits in (1.58, 4, 8, 16, 32) for packing in ("2bit", "base3")][:7]


def run(model, seed: int = 3) -> list[torch.Tensor]:
    """Logits, prefix embeddings, latent, and the slot of a read: every part of the model."""
    torch.manual_seed(seed)
    ids, pixels = torch.randint(0, 300, (2, 7)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        prefix = model.encode_image(pixels)
        embeds = torch.cat([prefix, model.embed(ids)], 1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        latent, key = model.memory_encode(embeds, mask)
        recalled, scope, _, slot = model.memory_read(key, latent, *model.memory_reset(2))
        return [model(embeds, mask, slot), prefix, latent, recalled, scope, slot[1][0]]


@pytest.mark.parametrize("weights", WIDTHS, ids=str)
def test_a_ternary_model_computes_the_same_bits_at_every_width(ternary_model, weights):
    lowered = lower(ternary_model, dataclasses.replace(weights, embedding_bits=8))
    for actual, expected in zip(run(lowered), run(ternary_model), strict=True):
        assert torch.equal(actual, expected)


def test_the_traced_operators_compute_the_same_bits(ternary_model):
    lowered = lower(ternary_model, WeightFormat())
    eager = run(lowered)
    set_traced(lowered, True)
    assert all(torch.equal(actual, expected) for actual, expected in zip(run(lowered), eager, strict=True))


@pytest.mark.parametrize("first", WIDTHS, ids=str)
def test_a_lowered_model_can_be_lowered_again_to_any_width_that_holds_trits(ternary_model, first):
    once = lower(ternary_model, first)
    if first.bits in (8, 4):
        with pytest.raises(UserError, match=f"already stored as int{first.bits}"):
            lower(once, WeightFormat(1.58))
        return
    again = lower(once, WeightFormat(1.58, "base3"))
    kinds = {layer.kind for layer in named_packed(again.decoder).values()}
    assert kinds == {"ternary3x5"}
    assert all(torch.equal(a, b) for a, b in zip(run(again), run(ternary_model), strict=True))


def test_lowering_leaves_the_original_alone(ternary_model):
    before = {key: value.clone() for key, value in ternary_model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in ternary_model.parameters()]
    lowered = lower(ternary_model, WeightFormat())
    with torch.no_grad():
        for tensor in lowered.state_dict().values():
            tensor.zero_()
    after = ternary_model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [parameter.requires_grad for parameter in ternary_model.parameters()] == flags
    assert not any(parameter.requires_grad for parameter in lowered.parameters())


def test_no_latent_weight_is_left_in_a_lowered_model(ternary_model):
    lowered = lower(ternary_model, WeightFormat())
    assert not any(isinstance(module, torch.nn.Linear) for module in lowered.modules())
    assert any(isinstance(module, TernaryLinear) for module in ternary_model.modules())
    floats = [
        key for key, value in lowered.state_dict().items() if value.is_floating_point() and value.ndim == 2
    ]
    # None of the three is a linear's weight.
    assert floats == ["memory_prior", "adapter.pooling_bias", "memory_encoder.pseudo_inverse"]


def test_each_part_gets_the_storage_of_its_kind(ternary_model):
    layers = named_packed(lower(ternary_model, WeightFormat(1.58, "base3", 4)))
    kinds = {
        part: {layer.kind for name, layer in layers.items() if name.startswith(part)}
        for part in (
            "decoder",
            "memory_encoder",
            "vision",
            "adapter",
            "memory_projection",
            "scope",
            "embedding",
        )
    }
    assert kinds.pop("decoder") == kinds.pop("memory_encoder") == {"ternary3x5"}
    assert kinds.pop("embedding") == {"int4"}
    assert set(map(frozenset, kinds.values())) == {frozenset({"int8"})}


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_an_embedding_keeps_its_rows_within_the_width(ternary_model, bits):
    lowered = lower(ternary_model, WeightFormat(1.58, "2bit", bits)).embedding
    assert isinstance(lowered, HalfEmbedding if bits == 16 else PackedEmbedding)
    ids = torch.arange(300)
    expected = ternary_model.embedding.embed(ids).detach()
    error = (lowered.embed(ids) - expected).abs().amax(1) / expected.abs().amax(1)
    assert error.max() <= {16: 1e-3, 8: 0.0, 4: 0.08}[bits]


def test_an_embedding_trained_at_eight_bits_is_widened_from_its_rounded_rows(ternary_model):
    wide = lower(ternary_model, WeightFormat(1.58, "2bit", 32)).embedding
    assert torch.equal(
        wide.embed(torch.arange(300)), ternary_model.embedding.embed(torch.arange(300)).detach()
    )
    assert not torch.equal(wide.weight, ternary_model.embedding.weight)


def test_a_float_model_at_32_bits_is_itself(float_model):
    lowered = lower(float_model, WeightFormat(32, "2bit", 32))
    assert all(torch.equal(a, b) for a, b in zip(run(lowered), run(float_model), strict=True))


def test_post_training_widths_get_closer_with_more_bits(float_model):
    exact = run(float_model)[0]
    errors = {}
    for bits in (16, 8, 4, 1.58):
        logits = run(lower(float_model, WeightFormat(bits, "2bit", 32)))[0]
        errors[bits] = ((logits - exact).norm() / exact.norm()).item()
    assert errors[16] < 2e-3 < errors[8] < 0.05
    assert errors[8] < errors[4] < errors[1.58]


def test_float_layers_at_sixteen_bits_are_halves(float_model):
    lowered = lower(float_model, WeightFormat(16, "2bit", 16))
    kinds = {type(layer) for layer in lowered.decoder.modules() if hasattr(layer, "columns")}
    assert kinds == {HalfLinear}
    again = lower(lowered, WeightFormat(8))
    assert {layer.kind for layer in named_packed(again.decoder).values()} == {"int8"}


def test_a_least_squares_scale_fits_better_than_the_mean():
    # Measured on Gaussian weights: .264 of the energy is lost with the mean, .213 with the refitted scale.
    weight = torch.randn(400, 600, generator=torch.Generator().manual_seed(0))
    plain, refitted = (
        ((weight - trits * scale).square().sum() / weight.square().sum()).item()
        for trits, scale in (ternarize(weight), _least_squares_trits(weight))
    )
    assert refitted < plain
    assert plain == pytest.approx(0.264, abs=0.01)
    assert refitted == pytest.approx(0.213, abs=0.01)


def test_float_and_ternary_training_are_told_apart(ternary_model, float_model):
    assert ternary_trained(ternary_model)
    assert ternary_trained(lower(ternary_model, WeightFormat()))
    assert ternary_trained(lower(ternary_model, WeightFormat(16)))
    assert not ternary_trained(float_model)
    assert not ternary_trained(lower(float_model, WeightFormat(8)))


def test_bytes_on_disk_are_the_promised_bits_per_weight():
    model = MicroVLM(preset("nano"))
    for packing_name, bits in (("2bit", 2.0), ("base3", 1.6)):
        layers = named_packed(lower(model, WeightFormat(1.58, packing_name)).decoder).values()
        weights = sum(layer.rows * layer.columns for layer in layers)
        stored = sum(layer.packed.numel() for layer in layers)
        assert stored * 8 / weights == pytest.approx(bits, rel=0.02)


def test_a_row_too_long_for_exact_four_bit_sums_is_refused():
    limit = packing.INT4_MAX_COLUMNS
    assert 128 * 7 * 255 * limit < 2**31 <= 128 * 7 * 255 * (limit + 1)
    with pytest.raises(UserError, match="use --bits 8"):
        quantize_linear(INTEGER_BY_BITS[4], torch.ones(1, limit + 1), None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 2}, "--bits 2"),
        ({"packing": "zip"}, "--packing zip"),
        ({"embedding_bits": 5}, "--embedding-bits 5"),
    ],
)
def test_a_format_that_is_not_offered_is_refused_as_the_flag(options, sentence):
    with pytest.raises(UserError, match=sentence):
        WeightFormat(**options)


def test_dense_trits_are_minus_one_zero_and_one(ternary_model):
    for bits, dtype in ((16, torch.float16), (32, torch.float32)):
        for layer in named_packed(lower(ternary_model, WeightFormat(bits)).decoder).values():
            assert isinstance(layer, DenseTritLinear)
            assert layer.weight.dtype == dtype
            assert set(np.unique(layer.weight.numpy())) <= {-1, 0, 1}


def test_a_vision_part_trained_in_float_is_stored_at_eight_bits_beside_ternary():
    model = seeded_model(tiny_config(dataclasses.replace(TERNARY, vision_bits=32)))
    layers = named_packed(lower(model, WeightFormat(1.58)))
    assert all(isinstance(layer, PackedLinear) for layer in layers.values())
    assert {layer.kind for name, layer in layers.items() if name.startswith("vision")} == {"int8"}
    assert FLOAT.decoder_bits == 32
