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
from microvlm.exporters.graph_check import check_graph, record, replay
from microvlm.exporters.replay.differences import Differences
from microvlm.exporters.replay.recording import Diverged, Recorder, Recording
from microvlm.exporters.tracing import call, example_inputs, trace
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.lowering import lower, named_packed, set_traced
from microvlm.model.memory_algebra import address, reference_memory
from microvlm.model.torch_runtime import listening
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
    """The column of [..., K] values in steps of an int8 activation with the value nearest to a tie, and the factor that
    takes it just across."""
    flat = unrounded.reshape(-1, unrounded.shape[-1])
    ties = np.floor(flat) + 0.5
    distance = np.where((np.abs(flat) > 5) & (np.abs(flat) < 100), np.abs(flat - ties), np.inf)
    row, column = np.unravel_index(distance.argmin(), flat.shape)
    value, tie = float(flat[row, column]), float(ties[row, column])
    return int(column), (tie + np.sign(tie - value) * 5e-5) / value


class Unrounded(Recorder):
    """Keeps every layer's activations just before rounding."""

    def __init__(self):
        super().__init__(Recording())
        self.values = {}

    def observe(self, layer, call):
        self.values[layer] = call.x * (127 / np.abs(call.x).max(-1, keepdims=True))


def example(lowered, name):
    """(spec, inputs, feeds) of a graph at the sizes of these tests."""
    spec = contract.graph(lowered.config, name)
    inputs = example_inputs(spec, SIZES, seed=1, vocab_size=lowered.config.text.vocab_size)
    return spec, inputs, {t.name: v.numpy() for t, v in zip(spec.inputs, inputs, strict=True)}


def test_activations_that_round_the_other_way_at_a_tie_pass_with_a_remark(graphs, lowered):
    """One element of one norm a little off: one value falls on the other side of its tie, and nothing else moves."""
    path = graphs / f"{DECODER}.onnx"
    set_traced(lowered, False)
    spec, inputs, _ = example(lowered, DECODER)
    unrounded = Unrounded()
    with listening(lowered, unrounded), torch.no_grad():
        call(lowered, spec, inputs)
    column, factor = scale_over_a_tie(unrounded.values["decoder.layers.0.self_attn.q_proj"])
    scale = np.ones(lowered.config.text.hidden_size, np.float32)
    scale[column] = factor
    edit_weights(path, lambda value: value * scale, "decoder.layers.0.input_layernorm.weight")
    checks, remark = check_graph(lowered, spec, path, 1)
    assert remark is not None
    assert "rounded the other way" in remark
    assert all(check.passed for check in checks)


def test_an_operator_that_rounds_to_another_range_fails_the_check(graphs, lowered):
    path = graphs / f"{DECODER}.onnx"
    proto = onnx.load(path, load_external_data=False)
    body = next(function for function in proto.functions if function.name == "TernaryMatMul2x4")
    limit = next(node for node in body.node if node.output[0] == "code_max")
    limit.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.array(126.0, np.float32)))
    path.write_bytes(proto.SerializeToString())
    checks, remark = check_graph(lowered, contract.graph(lowered.config, DECODER), path, 1)
    assert not all(check.passed for check in checks)
    assert "not by rounding ties" in remark


def test_a_graph_with_other_layers_than_the_model_fails_the_check(graphs, lowered):
    path = graphs / f"{DECODER}.onnx"
    edit_weights(path, lambda value: value * 1.02)
    proto = onnx.load(path, load_external_data=False)
    old, new = "decoder.layers.0.mlp.up_proj.packed", "decoder.layers.9.mlp.up_proj.packed"
    for node in proto.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
    next(tensor for tensor in proto.graph.initializer if tensor.name == old).name = new
    path.write_bytes(proto.SerializeToString())
    checks, remark = check_graph(lowered, contract.graph(lowered.config, DECODER), path, 1)
    assert not all(check.passed for check in checks)
    assert "decoder.layers.0.mlp.up_proj was called more often than in the recorded run" in remark


def test_a_recording_covers_every_quantised_layer_and_replays(graphs, lowered):
    set_traced(lowered, False)
    spec, inputs, feeds = example(lowered, DECODER)
    differences = Differences()
    recording, outputs = record(graphs / f"{DECODER}.onnx", feeds, differences, 1)
    layers = {name for name in named_packed(lowered) if name.startswith(("decoder.", "embedding."))}
    assert set(recording.layers) == layers
    activations = sum(call.activations_q8.size for calls in recording.layers.values() for call in calls)
    replay_outputs = replay(lowered, spec, inputs, recording, differences)
    assert differences.activations == activations
    assert differences.only_ties
    assert differences.sums > 0
    assert differences.operator_outputs > 0
    assert differences.arithmetic_is_equal
    for tensor, ours in zip(spec.outputs, replay_outputs, strict=True):
        np.testing.assert_allclose(outputs[tensor.name], ours, atol=1e-4)
    assert sorted(path.name for path in graphs.iterdir() if path.name.startswith(".")) == []


def test_a_replay_runs_on_the_recorded_activations_and_not_on_its_own(graphs, lowered):
    set_traced(lowered, False)
    spec, inputs, feeds = example(lowered, DECODER)
    differences, moved_recording = Differences(), Recording()
    recording, outputs = record(graphs / f"{DECODER}.onnx", feeds, differences, 1)
    for layer, calls in recording.layers.items():
        for layer_call in calls:
            moved_recording.add(
                layer,
                layer_call._replace(activations_q8=np.minimum(layer_call.activations_q8, 126) + np.int8(1)),
            )
    replay_outputs = replay(lowered, spec, inputs, moved_recording, differences)
    assert differences.activations_differing > 0.5 * differences.activations
    assert not differences.only_ties
    assert not differences.arithmetic_is_equal
    assert np.abs(replay_outputs[0] - outputs["logits"]).max() > 1e-3


def test_a_replay_that_leaves_recorded_calls_diverges(graphs, lowered):
    set_traced(lowered, False)
    spec, inputs, feeds = example(lowered, DECODER)
    recording, _ = record(graphs / f"{DECODER}.onnx", feeds, Differences(), 1)
    recording.add("embedding.table", recording.layers["embedding.table"][0])
    with pytest.raises(Diverged, match=r"embedding\.table was called more often in the recorded run"):
        replay(lowered, spec, inputs, recording, Differences())


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
    spec, inputs, feeds = example(lowered, spec.name)
    differences = Differences()
    recording, outputs = record(tmp_path / "memory_encode.onnx", feeds, differences, 1)
    layers = {name for name in named_packed(lowered) if name.startswith("memory_encoder.")}
    assert set(recording.layers) == layers
    replay_outputs = replay(lowered, spec, inputs, recording, differences)
    assert differences.only_ties
    assert differences.sums > 0
    assert differences.arithmetic_is_equal
    for tensor, ours in zip(spec.outputs, replay_outputs, strict=True):
        np.testing.assert_allclose(outputs[tensor.name], ours, atol=1e-4)


def test_example_keys_are_the_keys_of_their_latents():
    """The scope detector compares latents outside of the key space, so a part of the query must lie there."""
    config = preset("full")
    spec = contract.graph(config, "memory_read")
    inputs = example_inputs(spec, SIZES, seed=1, vocab_size=8)
    inputs_by_name = {tensor.name: value for tensor, value in zip(spec.inputs, inputs, strict=True)}
    latent, key = inputs_by_name["memory_code"], inputs_by_name["memory_key"]
    reference = reference_memory(config.memory.slots, config.memory.code_size)
    torch.testing.assert_close(key, address(latent, torch.linalg.pinv(reference)), atol=1e-5, rtol=0)
    outside = latent.square().sum(-1) - key.square().sum(-1)
    assert (outside > 0.1).all()


def test_examples_are_seeded(ternary_model):
    spec = contract.graph(ternary_model.config, DECODER)
    inputs, same_inputs, other_inputs = (example_inputs(spec, SIZES, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(inputs, same_inputs, strict=True))
    assert not torch.equal(inputs[0], other_inputs[0])
