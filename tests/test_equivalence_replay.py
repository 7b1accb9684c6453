"""Torch against ONNX Runtime on a real bundle: equal models pass, wrong ones fail, rounding ties are told apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from altered_bundles import altered, matmul_of, verdict_of
from click.testing import CliRunner
from onnx import helper, numpy_helper

from microvlm.backends import load
from microvlm.bench.bench_command import command
from microvlm.bench.equivalence.equivalence_bench import same_function
from microvlm.bench.equivalence.metrics import Agreement, Drift, Metrics
from microvlm.bench.equivalence.samples import spread
from microvlm.bench.equivalence.transcripts import slot_arrays
from microvlm.bench.equivalence.verdict import AMBIGUOUS, FAIL, PASS, judge
from microvlm.errors import UserError
from microvlm.exporters import contract
from microvlm.exporters.external_data import WeightStore, save_graph
from microvlm.exporters.replay.differences import Differences
from microvlm.exporters.replay.graph_probe import is_quantized_matmul, probe
from microvlm.exporters.replay.recording import Recorder, Recording, Replayer
from microvlm.exporters.tracing import trace
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.lowering import lower, named_packed, set_traced
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_runtime import TorchRuntime
from microvlm.runtime import MemoryArrays


def test_every_integer_sum_is_equal_and_replayed_logits_are_float_noise(speaking_bundle: Path) -> None:
    verdict, metrics = verdict_of(speaking_bundle, speaking_bundle)
    differences = metrics.differences
    assert verdict in (PASS, AMBIGUOUS)
    assert differences.sums > 100_000
    assert differences.sums_differing == 0
    assert differences.operator_outputs > 100_000
    assert differences.operator_mismatches == 0
    assert metrics.replayed.greedy_match == 1.0
    assert metrics.replayed.logits_max_abs_diff <= 1e-4
    assert metrics.replayed_drift.largest <= 1e-5
    assert 0 < metrics.replayed_drift.forgotten <= 1e-3
    assert len(metrics.drift.by_write) == 3


def test_onnx_runtime_recorded_and_torch_replayed_agree_too(speaking_bundle: Path) -> None:
    reference, candidate = load("ort", speaking_bundle, 1), load("torch", speaking_bundle, 1)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    recording, differences = Recording(), Differences()
    with reference.listening(Recorder(recording)):
        expected = reference.encode_image(pixels)
    with candidate.listening(Replayer(recording, differences)):
        actual = candidate.encode_image(pixels)
    assert recording.unused_calls == 0
    assert differences.sums > 0
    assert differences.sums_differing == 0
    assert np.abs(actual - expected).max() < 1e-4


def test_recording_changes_nothing_that_the_runtime_computes(speaking_bundle: Path) -> None:
    for backend in ("torch", "ort"):
        plain = load(backend, speaking_bundle, 1)
        state = MemoryArrays(*plain.memory_prior())
        key, latent = np.ones((1, 16), np.float32), np.linspace(-1, 1, 48, dtype=np.float32)[None]
        with plain.listening(Recorder(Recording())):
            recorded_reading = plain.memory_read(key, latent, state)
        direct = plain.memory_read(key, latent, state)
        assert recorded_reading.scope == direct.scope
        for ours, theirs in zip(slot_arrays(recorded_reading.slot), slot_arrays(direct.slot), strict=True):
            assert np.array_equal(ours, theirs)


def test_one_wrong_byte_of_packed_weights_fails(speaking_bundle: Path, tmp_path: Path) -> None:
    layer = "decoder.layers.1.mlp.down_proj"

    def flip(model: onnx.ModelProto) -> None:
        packed = next(t for t in model.graph.initializer if t.name == f"{layer}.packed")
        where = {entry.key: entry.value for entry in packed.external_data}
        data = tmp_path / "altered" / "onnx" / where["location"]
        content = bytearray(data.read_bytes())
        # The first row's low two bits hold one trit code, 0, 1 or 2: another of the three.
        place = int(where["offset"])
        content[place] = (content[place] & ~3) | (((content[place] & 3) + 1) % 3)
        data.write_bytes(content)

    bundle = altered(speaking_bundle, tmp_path, "decoder_model_merged", flip)
    verdict, metrics = verdict_of(speaking_bundle, bundle, images=1)
    assert verdict == FAIL
    assert metrics.differences.sums_differing > 0
    # One row of one layer: about one sum in 64 of that layer, none of any other.
    assert metrics.differences.sums_differing < metrics.differences.sums / 100
    assert metrics.differences.first[:2] == (layer, "sums")


def test_a_wrong_function_body_fails_with_status_1(
    speaking_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The native library would run in place of the body.
    monkeypatch.setenv("MICROVLM_NATIVE", "0")

    def halve_range(model: onnx.ModelProto) -> None:
        body = next(f for f in model.functions if f.name == "TernaryMatMul2x4")
        limit = next(node for node in body.node if node.output[0] == "code_max")
        limit.attribute[0].t.CopyFrom(numpy_helper.from_array(np.array(126.0, np.float32)))

    bundle = altered(speaking_bundle, tmp_path, "decoder_model_merged", halve_range)
    result = CliRunner().invoke(
        command,
        ["equivalence", str(bundle), "--images", "1", "--threads", "1", "--new-tokens", "3", "--json"],
        standalone_mode=False,
    )
    assert result.return_value == 1, result.output
    document = json.loads(result.stdout)
    assert document["verdict"] == "FAIL"
    assert document["replay"]["operator_mismatches"] > 0 or document["replay"]["sums_differing"] > 0


@pytest.mark.parametrize(
    ("moved_by", "verdict"), [(3e-6, AMBIGUOUS), (0.2, FAIL), (2.0, FAIL)], ids=["tie", "no tie", "two steps"]
)
def test_an_activation_next_to_a_tie_is_ambiguous_and_any_other_an_error(
    speaking_bundle: Path, tmp_path: Path, moved_by: float, verdict: str
) -> None:
    """The readout's input is a row of the memory, which a one-hot key reads exactly: 127 at the peak, .5 where it may
    round."""
    config = load("ort", speaking_bundle, 1).config
    row = np.zeros(config.memory.code_size, np.float32)
    row[:2] = 127, 0.5
    # It sees the latent times its gain.
    row /= np.float32(config.memory.code_size**0.5)
    noise = np.zeros_like(row)
    noise[1] = moved_by

    def move(model: onnx.ModelProto) -> None:
        node = matmul_of(model, "memory_projection.readout.fc1")
        model.graph.initializer.append(numpy_helper.from_array(noise, "noise"))
        position = list(model.graph.node).index(node)
        add_node = helper.make_node("Add", [node.input[0], "noise"], ["moved"])
        node.input[0] = "moved"
        model.graph.node.insert(position, add_node)

    reference = load("torch", speaking_bundle, 1)
    candidate = load("ort", altered(speaking_bundle, tmp_path, "memory_read", move), 1)
    mean = np.zeros((1, config.memory.slots, len(row)), np.float32)
    mean[0, 0] = row
    key = np.eye(1, config.memory.slots, dtype=np.float32)
    state = MemoryArrays(mean, np.eye(config.memory.slots, dtype=np.float32)[None])
    recording, differences = Recording(), Differences()
    with reference.listening(Recorder(recording)):
        ours = slot_arrays(reference.memory_read(key, row[None], state).slot)
    free = slot_arrays(candidate.memory_read(key, row[None], state).slot)
    with candidate.listening(Replayer(recording, differences)):
        replayed = slot_arrays(candidate.memory_read(key, row[None], state).slot)

    def difference(theirs: list[np.ndarray]) -> float:
        return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))

    assert difference(free) > 1e-3
    assert difference(replayed) < 1e-4
    assert differences.activations_differing == 1
    assert differences.sums_differing == 0
    assert differences.max_step == max(1, round(0.5 + moved_by))
    metrics = Metrics(
        free=Agreement(samples=1, equal=1, positions=1, top1_equal=1),
        drift=Drift(slot=difference(free)),
        replayed=Agreement(samples=1, equal=1),
        differences=differences,
        replayed_drift=Drift(slot=difference(replayed)),
    )
    assert judge(metrics).verdict == verdict
    layer = "memory_projection.readout.fc1"
    if verdict == AMBIGUOUS:
        assert (differences.first, differences.first_tie) == (None, layer)
    else:
        assert (differences.first.layer, differences.first.what) == (layer, "input")


def test_a_probed_graph_keeps_every_operator_and_names_layers_as_the_model_does(
    speaking_bundle: Path, ternary_model: MicroVLM
) -> None:
    expected_names = {
        name for name in named_packed(lower(ternary_model, WeightFormat())) if name.startswith("decoder.")
    }
    probed = probe(speaking_bundle / "onnx" / "decoder_model_merged.onnx")
    assert {layer.name for layer in probed.layers} == expected_names | {"embedding.table"}
    operators = [node for node in probed.model.graph.node if is_quantized_matmul(node)]
    # Each twice: as the graph has it, and on integers.
    assert len(operators) == 2 * len(probed.layers)
    assert {f.name for f in probed.model.functions} >= {node.op_type for node in operators}


@pytest.mark.export
def test_dense_trits_are_opened_up_too(ternary_model: MicroVLM, tmp_path: Path) -> None:
    lowered = lower(ternary_model, WeightFormat(16))
    spec = contract.graph(lowered.config, "memory_encode")
    set_traced(lowered, True)
    save_graph(trace(lowered, spec), spec.name, WeightStore(tmp_path))
    set_traced(lowered, False)
    probed = probe(tmp_path / "memory_encode.onnx")
    reference = TorchRuntime(lowered, directory=tmp_path)
    expected_names = {name for name in reference.quantized_layers() if name.startswith("memory_encoder.")}
    assert {layer.name for layer in probed.layers} == expected_names
    embeds = np.random.default_rng(0).normal(size=(1, 5, 64)).astype(np.float32)
    mask = np.ones((1, 5), np.int64)
    recording, differences = Recording(), Differences()
    with reference.listening(Recorder(recording)):
        latent, _ = reference.memory_encode(embeds, mask)
    session = probed.open(onnxruntime.SessionOptions())

    def run(feeds: dict, names: Sequence[str]) -> dict:
        return dict(zip(names, session.run(list(names), feeds), strict=True))

    feeds = {"inputs_embeds": embeds, "attention_mask": mask}
    outputs = probed.run(run, feeds, Replayer(recording, differences))
    assert recording.unused_calls == 0
    assert differences.sums > 0
    assert differences.sums_differing == 0
    assert differences.activations_differing <= 1
    assert np.abs(outputs["memory_code"] - latent).max() < 1e-5


def test_trits_are_one_function_in_any_bytes_and_another_training_is_another(ternary_model: MicroVLM) -> None:
    two_bits = lower(ternary_model, WeightFormat(1.58, "2bit"))
    for other_format in (WeightFormat(1.58, "base3"), WeightFormat(8), WeightFormat(4), WeightFormat(16)):
        assert same_function(two_bits, lower(ternary_model, other_format)), other_format
    assert not same_function(two_bits, lower(ternary_model, WeightFormat(embedding_bits=4)))
    changed_model = lower(ternary_model, WeightFormat())
    changed_model.decoder.norm.weight.data[0] += 1
    assert not same_function(two_bits, changed_model)


def test_the_document_has_every_field_of_the_contract(speaking_bundle: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    result = CliRunner().invoke(
        command,
        [
            *("equivalence", str(speaking_bundle), "--images", "1", "--threads", "1", "--new-tokens", "3"),
            *("--json", "--markdown", str(page)),
        ],
        standalone_mode=False,
    )
    document = json.loads(result.stdout)
    # Random weights make nearly equal logits: a rounding tie may turn an answer, which replay must take back.
    assert result.return_value == (document["verdict"] == "FAIL")
    assert document["verdict"] in ("PASS", "AMBIGUOUS", "FAIL")
    assert all("teacher-forced" in reason for reason in document["reasons"]) or result.return_value == 0
    assert document["verdict"] in result.stderr
    for name in ("greedy_match", "top1_agreement", "logits_max_abs_diff", "kl_mean", "memory_drift"):
        assert isinstance(document[name], float), name
    assert document["integer_exact"] is True
    replay = document["replay"]
    assert replay["greedy_match"] == 1.0
    assert replay["logits_max_abs_diff"] <= 1e-4
    assert {"codes", "codes_differing", "max_code_step", "max_tie_distance"} <= replay.keys()
    assert document["samples"] == 1 + 1 + 20
    assert len(document["memory"]["mean_by_write"]) == 20
    assert document["verdict"] in page.read_text()


def test_another_model_is_judged_by_the_answers_it_loses(speaking_bundle: Path, tmp_path: Path) -> None:
    def change_norm(model: onnx.ModelProto) -> None:
        norm = next(t for t in model.graph.initializer if t.name == "decoder.norm.weight")
        values = numpy_helper.to_array(norm).copy()
        norm.CopyFrom(numpy_helper.from_array(values[::-1].copy(), norm.name))

    other_bundle = altered(speaking_bundle, tmp_path, "decoder_model_merged", change_norm)
    result = CliRunner().invoke(
        command,
        [
            *("equivalence", str(speaking_bundle), "--against", str(other_bundle), "--images", "1"),
            *("--candidate", "torch", "--threads", "1", "--new-tokens", "2", "--json"),
        ],
        standalone_mode=False,
    )
    document = json.loads(result.stdout)
    assert document["question"] == "what did storing it narrower cost?"
    assert document["replay"]["codes"] is None
    assert document["integer_exact"] is None
    assert document["kl_mean"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--images", "0"], "--images is 0"),
        (["--candidate", "torch"], "choose two backends"),
        (["--candidate", "nobody"], "unknown backend 'nobody'"),
        (["--new-tokens", "0"], "--new-tokens is 0"),
    ],
)
def test_bad_options_are_one_sentence(speaking_bundle: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        command.main(["equivalence", str(speaking_bundle), *arguments], standalone_mode=False)


def test_samples_are_spread_over_the_set() -> None:
    assert spread(range(10), 5) == [0, 2, 4, 6, 8]
    assert spread(range(3), 9) == [0, 1, 2]
    assert spread(range(9), 0) == []
