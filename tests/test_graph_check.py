"""The check after an export: passes what is the model, forgives rounding ties and nothing else."""

import dataclasses
import shutil

import numpy as np
import onnx
import pytest
import torch
from conftest import seeded_model, tiny_config

from microvlm.exporters import contract
from microvlm.exporters.external_data import WeightStore, save_graph
from microvlm.exporters.graph_check import check_graph
from microvlm.exporters.replay import CodeDifferences, record, replay
from microvlm.exporters.tracing import example_inputs, trace
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.lowering import lower, named_packed, set_traced
from microvlm.model.memory_algebra import address, reference_memory
from microvlm.presets import preset

DECODER = "decoder_model_merged"
SIZES = {contract.BATCH: 2, contract.SEQUENCE: 3, contract.PAST: 4, contract.TOTAL: 7}


@pytest.fixture(scope="module")
def lowered(ternary_model):
    return lower(ternary_model, WeightFormat())


@pytest.fixture
def graphs(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle / "onnx", tmp_path / "onnx")


def edit_weights(path, change, part: str = "norm") -> None:
    """Apply `change` to every small float weight of a saved graph whose name has `part` in it."""
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        if part in tensor.name:
            value = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(change(value).astype(value.dtype), tensor.name))
    path.write_bytes(proto.SerializeToString())


def test_altered_packed_weights_fail_the_check(graphs, lowered):
    data = graphs / f"{DECODER}.data"
    data.write_bytes(bytes(byte ^ 1 if i % 97 == 0 else byte for i, byte in enumerate(data.read_bytes())))
    checks, remark = check_graph(
        lowered, contract.graph(lowered.config, DECODER), graphs / f"{DECODER}.onnx", 1
    )
    assert not all(check.passed for check in checks)
    assert "not by rounding ties" in remark


def test_a_wrong_norm_fails_the_check(graphs, lowered):
    edit_weights(graphs / f"{DECODER}.onnx", lambda value: value * 1.02)
    checks, remark = check_graph(
        lowered, contract.graph(lowered.config, DECODER), graphs / f"{DECODER}.onnx", 1
    )
    assert not all(check.passed for check in checks)
    assert "not by rounding ties" in remark


def test_a_graph_that_gives_nan_fails_the_check(graphs, lowered):
    edit_weights(graphs / f"{DECODER}.onnx", lambda value: value * np.nan)
    checks, _ = check_graph(lowered, contract.graph(lowered.config, DECODER), graphs / f"{DECODER}.onnx", 1)
    assert not any(check.passed for check in checks if check.output == "logits")


def scale_over_a_tie(unrounded: np.ndarray) -> tuple[int, float]:
    """The column of [..., K] values in code steps with the value nearest to a tie, and what takes it just across."""
    flat = unrounded.reshape(-1, unrounded.shape[-1])
    ties = np.floor(flat) + 0.5
    distance = np.where((np.abs(flat) > 5) & (np.abs(flat) < 100), np.abs(flat - ties), np.inf)
    row, column = np.unravel_index(distance.argmin(), flat.shape)
    value, tie = float(flat[row, column]), float(ties[row, column])
    return int(column), (tie + np.sign(tie - value) * 5e-5) / value


def test_codes_that_round_the_other_way_at_a_tie_pass_with_a_remark(graphs, lowered):
    """One element of one norm a little off: one value falls on the other side of its tie, and nothing else moves."""
    path = graphs / f"{DECODER}.onnx"
    set_traced(lowered, False)
    _, _, _, recording = recorded(lowered, path, DECODER)
    column, factor = scale_over_a_tie(recording["decoder.layers.0.self_attn.q_proj"])
    scale = np.ones(lowered.config.text.hidden_size, np.float32)
    scale[column] = factor
    edit_weights(path, lambda value: value * scale, "decoder.layers.0.input_layernorm.weight")
    checks, remark = check_graph(lowered, contract.graph(lowered.config, DECODER), path, 1)
    assert remark is not None
    assert "rounded the other way" in remark
    assert all(check.passed for check in checks)


def recorded(lowered, path, name):
    spec = contract.graph(lowered.config, name)
    inputs = example_inputs(spec, SIZES, seed=1, vocab_size=lowered.config.text.vocab_size)
    feeds = {t.name: v.numpy() for t, v in zip(spec.inputs, inputs, strict=True)}
    outputs, recording = record(path, [t.name for t in spec.outputs], feeds, threads=1)
    return spec, inputs, outputs, recording


def test_a_recording_covers_every_quantised_layer_and_replays(graphs, lowered):
    set_traced(lowered, False)
    spec, inputs, outputs, recording = recorded(lowered, graphs / f"{DECODER}.onnx", DECODER)
    layers = {name for name in named_packed(lowered) if name.startswith(("decoder.", "embedding."))}
    assert set(recording) == layers
    replayed, differences = replay(lowered, spec, inputs, recording)
    assert differences.codes == sum(value.size for value in recording.values())
    assert differences.only_ties
    for theirs, ours in zip(outputs, replayed, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert sorted(path.name for path in graphs.iterdir() if path.name.startswith(".")) == []


def test_a_replay_runs_on_the_recorded_codes_and_not_on_its_own(graphs, lowered):
    set_traced(lowered, False)
    spec, inputs, outputs, recording = recorded(lowered, graphs / f"{DECODER}.onnx", DECODER)
    moved = {name: value + 1 for name, value in recording.items()}
    replayed, differences = replay(lowered, spec, inputs, moved)
    assert differences.differing > 0.5 * differences.codes
    assert not differences.only_ties
    assert np.abs(replayed[0] - outputs[0]).max() > 1e-3


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.export
def test_trits_stored_dense_are_recorded_too(bits, tmp_path):
    config = tiny_config()
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, encoder_layers=1))
    lowered = lower(seeded_model(config), WeightFormat(bits=bits))
    spec = contract.graph(config, "memory_encode")
    set_traced(lowered, True)
    save_graph(trace(lowered, spec), spec.name, WeightStore(tmp_path))
    set_traced(lowered, False)
    spec, inputs, outputs, recording = recorded(lowered, tmp_path / "memory_encode.onnx", spec.name)
    assert set(recording) == {name for name in named_packed(lowered) if name.startswith("memory_encoder.")}
    replayed, differences = replay(lowered, spec, inputs, recording)
    assert differences.only_ties
    for theirs, ours in zip(outputs, replayed, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_example_keys_are_the_keys_of_their_codes():
    """Where the scope detector compares codes, outside of the key space, something must be left of the query."""
    config = preset("full")
    spec = contract.graph(config, "memory_read")
    inputs = example_inputs(spec, SIZES, seed=1, vocab_size=8)
    named = {tensor.name: value for tensor, value in zip(spec.inputs, inputs, strict=True)}
    code, key = named["memory_code"], named["memory_key"]
    reference = reference_memory(config.memory.slots, config.memory.code_size)
    torch.testing.assert_close(key, address(code, torch.linalg.pinv(reference)), atol=1e-5, rtol=0)
    outside = code.square().sum(-1) - key.square().sum(-1)
    assert (outside > 0.1).all()


def test_code_differences_count_steps_and_distances_from_ties():
    differences = CodeDifferences()
    unrounded = np.array([1.4999, 2.2, -3.5001], np.float32)
    differences.add(np.array([2.0, 2.0, -3.0]), np.rint(unrounded), unrounded)
    assert (differences.codes, differences.differing, differences.max_step) == (3, 2, 1)
    assert differences.max_tie_distance == pytest.approx(1e-4, rel=0.01)
    assert differences.only_ties
    differences.add(np.array([3.0]), np.array([2.0]), np.array([2.2], np.float32))
    assert not differences.only_ties


def test_examples_are_seeded(ternary_model):
    spec = contract.graph(ternary_model.config, DECODER)
    one, same, other = (example_inputs(spec, SIZES, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
