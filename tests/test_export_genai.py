"""`microvlm-export --genai`: decoders of token ids beside a bundle's graphs, on its weights, checked like them.

The programs that run them are tested with `nox -s elsewhere`.
"""

from __future__ import annotations

import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest

from microvlm.errors import UserError
from microvlm.exporters.bundle_writer import CheckFailed, export
from microvlm.exporters.elsewhere import genai_files
from microvlm.formats.bundle import open_bundle
from microvlm.formats.weight_format import WeightFormat
from microvlm.inputs.processor import Processor

pytestmark = pytest.mark.export
WEIGHTS = WeightFormat(1.58)


@pytest.fixture(scope="module")
def exported(speaking_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("genai") / "bundle"
    return folder, export(speaking_checkpoint, folder, WEIGHTS, genai=True)


def test_the_decoders_compute_what_the_bundles_graphs_compute(exported):
    checks = [check for check in exported[1].checks if check.graph in ("model", "decoder_genai")]
    assert len(checks) == 6
    assert [check.max_abs_diff for check in checks] == [0.0] * 6


def test_the_files_are_listed_and_weights_are_not_stored_again(exported):
    folder, _ = exported
    files = open_bundle(folder, verify=True).files
    assert {"genai_config.json", "onnx/model.onnx", "onnx/decoder_genai.onnx", "onnx/config.json"} <= set(
        files
    )
    for name in ("model", "decoder_genai"):
        decoder = onnx.load(folder / "onnx" / f"{name}.onnx", load_external_data=False)
        locations = {
            entry.value for tensor in decoder.graph.initializer for entry in tensor.external_data[:1]
        }
        assert locations >= {"decoder_model_merged.data", "embedding.data"}
        inside = sum(tensor.ByteSize() for tensor in decoder.graph.initializer if not tensor.external_data)
        assert inside < 50_000


def test_the_configuration_names_tensors_that_the_decoder_has(exported):
    folder, _ = exported
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    session = onnxruntime.InferenceSession(str(folder / model["decoder"]["filename"]))
    inputs, outputs = model["decoder"]["inputs"], model["decoder"]["outputs"]
    layers = range(model["decoder"]["num_hidden_layers"])
    named = {value % layer if "%d" in value else value for value in inputs.values() for layer in layers}
    assert {each.name for each in session.get_inputs()} == named
    named = {value % layer if "%d" in value else value for value in outputs.values() for layer in layers}
    assert {each.name for each in session.get_outputs()} == named
    assert model["eos_token_id"] == list(Processor.from_pretrained(folder).stop_tokens)


def test_a_slot_that_is_masked_has_no_influence_and_one_that_is_seen_has(exported):
    folder, _ = exported
    session = onnxruntime.InferenceSession(str(folder / "onnx" / "decoder_genai.onnx"))
    random = np.random.default_rng(0)
    sizes = {"batch": 1, "sequence": 3, "past": 0, "past + sequence": 3, "images": 1, "rows": 1}
    feeds = {}
    for each in session.get_inputs():
        shape = [sizes.get(dim, dim) for dim in each.shape]
        is_integer = each.type == "tensor(int64)"
        feeds[each.name] = (
            np.ones(shape, np.int64) if is_integer else random.standard_normal(shape, np.float32)
        )
    changed = {name: value + 1 if name.startswith("memory_kv") else value for name, value in feeds.items()}
    hidden = {"memory_visible": np.zeros((1, 1), np.int64)}
    logits = [
        session.run(["logits"], {**each, **extra})[0] for each in (feeds, changed) for extra in ({}, hidden)
    ]
    assert (logits[1] == logits[3]).all()
    assert np.abs(logits[0] - logits[2]).max() > 1e-3


def test_a_decoder_that_differs_is_found_and_no_bundle_is_left(speaking_checkpoint, tmp_path, monkeypatch):
    right = genai_files.text_decoder

    def wrong(*arguments, **keywords):
        decoder = right(*arguments, **keywords)
        one = next(node for node in decoder.graph.node if node.output[0] == "moved_positions")
        one.input[1] = "image_token"
        return decoder

    monkeypatch.setattr(genai_files, "text_decoder", wrong)
    with pytest.raises(CheckFailed) as failure:
        export(speaking_checkpoint, tmp_path / "bundle", WEIGHTS, genai=True)
    # Positions are relative: only a slot that is seen tells a wrong shift.
    failed = {check.graph for check in failure.value.report.checks if not check.passed}
    assert failed == {"decoder_genai"}
    assert not (tmp_path / "bundle").exists()


def test_a_checkpoint_without_a_tokenizer_is_refused_in_a_sentence(tiny_checkpoint, tmp_path):
    expected = re.escape(
        f"{tiny_checkpoint} has no tokenizer.json, which --genai needs: leave --genai out, or add the file."
    )
    with pytest.raises(UserError, match=expected):
        export(tiny_checkpoint, tmp_path / "bundle", WEIGHTS, genai=True)
    assert not (tmp_path / "bundle").exists()
