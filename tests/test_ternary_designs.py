"""Designs of ternary layers: their arithmetic, and the comparison on a tiny model."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from assembled_start import assembled_start
from conftest import FLOAT, seeded_model, tiny_config

from microvlm.bench.report import report_of_file
from microvlm.bench.training.ternary_design import DESIGNS, TernaryDesign, bits_per_weight
from microvlm.console import run_click
from microvlm.model.linear import TernaryLinear, ternarize
from microvlm.training.ternary_designs.designed_linear import (
    DesignedLinear,
    hadamard,
    rotate,
    round_to_trits,
)
from microvlm.training.train_command import whole_command
from microvlm.training.warm_start import begin_sub_norms, start_from


def layer(inputs: int = 128, outputs: int = 6, seed: int = 0) -> TernaryLinear:
    torch.manual_seed(seed)
    return TernaryLinear(inputs, outputs, bias=True)


def test_one_scale_a_matrix_is_what_ships():
    shipped = layer()
    trits, scale = ternarize(shipped.weight)
    assert torch.equal(round_to_trits(shipped.weight, None), trits * scale)
    x = torch.randn(3, 5, 128)
    designed = DesignedLinear(shipped, DESIGNS["tensor"])
    torch.testing.assert_close(designed(x), shipped(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("group", "groups"), [(0, 1), (48, 3), (64, 2), (128, 1)])
def test_scales_of_rows_and_groups(group, groups):
    weight = layer().weight.detach()
    rounded = round_to_trits(weight, group)
    parts, wholes = rounded.split(group or 128, 1), weight.split(group or 128, 1)
    assert len(parts) == groups
    for part, whole in zip(parts, wholes, strict=True):
        scale = whole.abs().mean(1, keepdim=True)
        assert torch.equal(part, (whole / scale).round().clamp(-1, 1) * scale)
        assert (part.abs().amax(1) - scale[:, 0]).abs().max() < 1e-7


def test_smaller_groups_round_nearer():
    torch.manual_seed(1)
    weight = torch.randn(32, 256) * torch.rand(32, 256).exp() * torch.rand(32, 1)
    errors = [float((round_to_trits(weight, group) - weight).square().mean()) for group in (None, 0, 64)]
    assert errors[0] > errors[1] > errors[2]


def test_a_rotation_keeps_float_products():
    torch.manual_seed(2)
    x, weight = torch.randn(4, 128, dtype=torch.float64), torch.randn(6, 128, dtype=torch.float64)
    matrix = hadamard(64, x)
    assert torch.allclose(matrix @ matrix.T, torch.eye(64, dtype=torch.float64))
    assert torch.allclose(rotate(x, 64) @ rotate(weight, 64).T, x @ weight.T)


def test_a_rotation_takes_over_the_weight_once():
    shipped = layer()
    before = shipped.weight.detach().clone()
    rotated = DesignedLinear(shipped, DESIGNS["rotated"])
    torch.testing.assert_close(rotated.weight.detach(), rotate(before, 64))
    narrow = DesignedLinear(layer(inputs=96), DESIGNS["rotated"])
    assert narrow.rotation == 0  # 64 does not divide 96


@pytest.mark.parametrize("name", list(DESIGNS))
def test_gradients_reach_weights_and_inputs(name):
    designed = DesignedLinear(layer(), DESIGNS[name])
    x = torch.randn(4, 128, requires_grad=True)
    designed(x).square().sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().min()) > 0
    assert float(designed.weight.grad.abs().max()) > 0


def test_bits_a_weight():
    assert bits_per_weight(DESIGNS["tensor"], 576) == 2.0
    assert bits_per_weight(DESIGNS["row"], 512) == 2.0 + 16 / 512
    assert bits_per_weight(TernaryDesign("", "", group=128), 576) == 2.0 + 16 * 5 / 576


@pytest.fixture
def start(tmp_path, tiny_processor):
    return assembled_start(tmp_path / "start", tiny_processor.tokenizer)


def test_new_norms_have_the_size_of_their_inputs(start):
    model = seeded_model(tiny_config())
    absent = start_from(model, str(start))
    assert any("sub_norm" in name for name in absent)
    begin_sub_norms(model, str(start))
    gains = [value for name, value in model.decoder.state_dict().items() if "sub_norm" in name]
    assert all(float(gain.min()) == float(gain.max()) > 0 for gain in gains)
    # The float decoder's output through such norms stays near what it was: with gains of one it does not.
    config = tiny_config(FLOAT)
    ids = torch.arange(40).reshape(2, 20) % config.text.vocab_size
    outputs = {}
    for name in ("without", "sized", "ones"):
        text = dataclasses.replace(config.text, sub_norm=name != "without")
        changed = seeded_model(dataclasses.replace(config, text=text))
        start_from(changed, str(start))
        norms = [module for key, module in changed.decoder.named_modules() if key.endswith("sub_norm")]
        for norm in norms if name == "ones" else []:
            torch.nn.init.ones_(norm.weight)
        if name == "sized":
            begin_sub_norms(changed, str(start))
        with torch.no_grad():
            outputs[name] = changed.hidden_states(changed.embed(ids), torch.ones_like(ids))
    distance = {name: float((outputs[name] - outputs["without"]).norm()) for name in ("sized", "ones")}
    assert distance["sized"] < distance["ones"]


def test_the_command_compares_designs(start, tmp_path, capsys):
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "house", "tree"]
    lines = [{"text": f"{n} a {a} and a {b}"} for n, (a, b) in enumerate(rng.choice(words, (60, 2)))]
    texts = tmp_path / "captions.jsonl"
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "designs.json"
    arguments = ["designs", "--start", start, "--data", texts, "--steps", "6", "--batch-size", "8", "-o", out]
    chosen = ["tensor", "group", "qat"]
    for name in chosen:
        arguments += ["--design", name]
    with pytest.raises(SystemExit) as exit_info:
        run_click(whole_command(), [str(argument) for argument in arguments])
    assert not exit_info.value.code, capsys.readouterr().err
    document = json.loads(out.read_text())
    assert [row["name"] for row in document["rows"]] == chosen
    for row in document["rows"]:
        assert row["rounded"]["kl"]["value"] > 0
        assert row["trained"]["kl"]["value"] != row["rounded"]["kl"]["value"]
    table = report_of_file(out).tables[0]
    assert len(table.rows) == 1 + len(chosen)


def test_no_texts_is_said_in_a_sentence(start, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_click(whole_command(), ["designs", "--start", str(start), "--data", str(tmp_path / "none.jsonl")])
    assert exit_info.value.code == 2
    assert "does not exist" in capsys.readouterr().err
