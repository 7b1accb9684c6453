"""Bits fitted to texts: outputs move less than by rounding, and what is stored is what the operator reads."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import FLOAT, seeded_model, tiny_config
from test_export_command import assert_one_sentence
from test_export_command import export as run_export

from microvlm.exporters.calibration.calibrated_model import calibrate, is_fitted
from microvlm.exporters.calibration.compensated_rounding import round_matrix
from microvlm.exporters.smaller.samples import Sample
from microvlm.exporters.smaller.text_costs import compare
from microvlm.exporters.smaller.text_rows import Reader
from microvlm.formats.packing import quantize_groups_int4, unpack_groups_int4
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.linear import PackedLinear
from microvlm.model.lowering import lower

TEXTS = [
    Sample(f"what is this? a {word} heart of the image {n}")
    for n, word in enumerate(["red", "this", "a", "it"] * 6)
]


def moments_of(columns, seed=0):
    """H of inputs of which many depend on few."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(400, columns // 4, generator=generator) @ torch.randn(
        columns // 4, columns, generator=generator
    )
    inputs = mixed + 0.3 * torch.randn(400, columns, generator=generator)
    return (inputs.mT @ inputs).double()


def stored(codes, multiplier, scale):
    return codes.float() * multiplier.float().repeat_interleave(32, 1) * scale[:, None]


def moved(weight, rounded, moments):
    difference = (weight - rounded).double()
    return float(((difference @ moments) * difference).sum())


def test_outputs_move_far_less_than_by_rounding():
    weight, moments = torch.randn(48, 128, generator=torch.Generator().manual_seed(1)), moments_of(128)
    codes, multiplier, scale = round_matrix(weight, moments)
    packed, by_rounding, row_scale = quantize_groups_int4(weight.numpy())
    plain = torch.from_numpy(unpack_groups_int4(packed, by_rounding, 128) * row_scale[:, None])
    assert moved(weight, stored(codes, multiplier, scale), moments) < 0.4 * moved(weight, plain, moments)
    assert (codes.abs() <= 7).all()
    assert (multiplier >= 1).all()
    assert (multiplier.dtype, codes.dtype, scale.dtype) == (torch.uint8, torch.int8, torch.float32)


def test_weights_that_four_bits_hold_stay_what_they_are():
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(-7, 8, (6, 64), generator=generator)
    codes[:, ::32] = 7  # so that each group's step is seen
    weight = codes * torch.tensor([0.5, 0.25]).repeat_interleave(32)
    found, multiplier, scale = round_matrix(weight, moments_of(64))
    # A multiplier of 255 parts is rounded itself: by a fifth of a per cent at most.
    assert torch.allclose(stored(found, multiplier, scale), weight, rtol=5e-3)
    assert torch.equal(found, codes.to(torch.int8))


def test_a_column_without_inputs_and_a_row_of_zeros_do_no_harm():
    weight, moments = torch.randn(4, 32), moments_of(32)
    weight[2] = 0
    moments[5], moments[:, 5] = 0, 0
    codes, multiplier, scale = round_matrix(weight, moments)
    assert torch.isfinite(stored(codes, multiplier, scale)).all()
    assert (codes[2] == 0).all()


@pytest.mark.parametrize(
    ("columns", "bad", "words"), [(40, 0.0, "whole groups"), (32, float("nan"), "not finite")]
)
def test_what_cannot_be_fitted_is_an_error(columns, bad, words):
    moments = torch.eye(columns, dtype=torch.float64)
    moments[0, 0] += bad
    with pytest.raises(ValueError, match=words):
        round_matrix(torch.randn(4, columns), moments)


def test_a_fitted_decoder_is_nearer_to_its_floats_than_a_rounded_one(tiny_processor):
    model = seeded_model(tiny_config(FLOAT))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = Reader(model, tiny_processor)
    lines = []
    fitted = calibrate(whole, TEXTS, 4, lines.append)
    assert len(lines) == 2
    linears = [m for m in fitted.decoder.modules() if isinstance(m, PackedLinear)]
    assert [linear.kind for linear in linears] == ["int4"] * 14
    assert all(linear._integers is None for linear in linears)
    assert (is_fitted(model), is_fitted(fitted)) == (True, False)
    weights = WeightFormat(4)
    costs = [compare(whole, Reader(lower(m, weights), tiny_processor), TEXTS).kl for m in (fitted, model)]
    assert costs[0] < 0.6 * costs[1]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("heads", "sub_norm"), [((2, 1), False), ((2, 2), True)], ids=["shared-heads", "subln"]
)
def test_smoothing_changes_nothing_in_floats_and_less_by_rounding(heads, sub_norm, tiny_processor):
    text = dataclasses.replace(tiny_config().text, num_key_value_heads=heads[1], sub_norm=sub_norm)
    model = seeded_model(tiny_config(FLOAT, text=text))
    with torch.no_grad():
        for layer in model.decoder.layers:  # outliers, as trained models have them
            layer.input_layernorm.weight[3] *= 40
            layer.self_attn.q_proj.weight[:, 3] /= 40
            layer.self_attn.k_proj.weight[:, 3] /= 40
            layer.self_attn.v_proj.weight[5] *= 30
            layer.mlp.up_proj.weight[7] *= 50
            layer.mlp.down_proj.weight[:, 7] /= 50
    whole = Reader(model, tiny_processor)
    smoothed = calibrate(whole, TEXTS, 8, lambda line: None)
    assert not any(isinstance(module, PackedLinear) for module in smoothed.decoder.modules())
    same = compare(whole, Reader(smoothed, tiny_processor), TEXTS)
    assert same.kl < 1e-6
    if not sub_norm:  # SubLN takes most of these outliers away itself
        costs = [
            compare(whole, Reader(lower(m, WeightFormat(8)), tiny_processor), TEXTS).kl
            for m in (smoothed, model)
        ]
        assert costs[0] < 0.5 * costs[1]


def test_packed_bytes_are_those_of_the_codes():
    from microvlm.exporters.calibration.calibrated_model import _packed

    linear = torch.nn.Linear(64, 5)
    moments = moments_of(64)
    layer = _packed(linear, moments)
    codes, multiplier, scale = round_matrix(linear.weight.detach(), moments)
    assert torch.equal(layer.unpack() * layer.scale[:, None], stored(codes, multiplier, scale))
    assert np.array_equal(layer.bias.detach().numpy(), linear.bias.detach().numpy())


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        ("16", "--calibrate has nothing to calibrate here: give --bits 8 or 4"),
        ("4", "--calibrate fits the weights of a float decoder, and this one has none"),
    ],
)
def test_where_there_is_nothing_to_fit_it_is_said(bits, words, speaking_checkpoint, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("what is this?\n\n" * 200)
    options = ["--bits", bits, "--calibrate", tmp_path / "t.txt"]
    assert_one_sentence(run_export([speaking_checkpoint, "-o", tmp_path / "b", *options], capsys), words)
    assert not (tmp_path / "b").exists()


@pytest.mark.export
def test_an_export_says_what_fitting_was_worth(tiny_processor, tmp_path, capsys):
    seeded_model(tiny_config(FLOAT)).save_pretrained(tmp_path / "c")
    tiny_processor.save(tmp_path / "c")
    texts = [f"{sample.text} {number}" for number, sample in enumerate(TEXTS * 4)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--bits", "4", "--calibrate", tmp_path / "t.jsonl", "--threads", "1", "--json"]
    status, stdout, _ = run_export([tmp_path / "c", "-o", tmp_path / "b", *options], capsys)
    assert status == 0
    (cut,) = json.loads(stdout)["cuts"]
    assert (cut["what"], cut["after"], cut["predicted_saved_bytes"]) == ("bits", 4, 0)
    assert 0 < cut["costs"]["kl"] < cut["costs"]["kl_of_rounding"]
