"""A bundle is self-contained and says truly what it holds: files, hashes, contract, bits per weight."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from microvlm.config import MicroVLMConfig
from microvlm.exporters import contract
from microvlm.exporters.bundle_manifest import bits_per_weight
from microvlm.formats.manifest import read_manifest, sha256
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.checkpoint import build_lowered
from microvlm.model.lowering import lower
from microvlm.model.microvlm import MicroVLM


@pytest.fixture(scope="module")
def manifest(tiny_bundle) -> dict:
    return json.loads((tiny_bundle / "manifest.json").read_text())


def test_every_file_is_listed_with_its_bytes_and_hash(tiny_bundle, manifest):
    present = {
        str(path.relative_to(tiny_bundle))
        for path in tiny_bundle.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert present == set(manifest["files"])
    for name, entry in manifest["files"].items():
        assert entry == {"bytes": (tiny_bundle / name).stat().st_size, "sha256": sha256(tiny_bundle / name)}


def test_the_manifest_repeats_the_contract(manifest, ternary_model):
    for spec in contract.graphs(ternary_model.config):
        graph_entry = manifest["graphs"][spec.name]
        assert graph_entry["file"] == spec.file
        for kind, tensors in (("inputs", spec.inputs), ("outputs", spec.outputs)):
            assert [(t["name"], t["dtype"], tuple(t["shape"])) for t in graph_entry[kind]] == [
                (t.name, t.dtype, t.shape) for t in tensors
            ]


def test_the_configuration_is_the_checkpoints(tiny_bundle, ternary_model):
    assert MicroVLMConfig.load(tiny_bundle) == ternary_model.config


def test_the_prior_of_the_memory_is_in_the_bundle(tiny_bundle, ternary_model):
    tensors = load_file(tiny_bundle / "memory_prior.safetensors")
    assert list(tensors) == ["memory_prior"]
    np.testing.assert_array_equal(tensors["memory_prior"], ternary_model.memory_prior.detach().numpy())


def test_the_lowered_layers_of_the_manifest_rebuild_the_model(tiny_bundle, ternary_model):
    empty = MicroVLM(ternary_model.config)
    build_lowered(empty, read_manifest(tiny_bundle).lowered)
    expected_state = lower(ternary_model, WeightFormat()).state_dict()
    assert {key: value.shape for key, value in empty.state_dict().items()} == {
        key: value.shape for key, value in expected_state.items()
    }


def test_no_path_of_this_machine_is_in_the_bundle(tiny_bundle):
    here = str(Path(__file__).resolve().parent.parent).encode()
    for path in tiny_bundle.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert here not in content, path
            assert str(tiny_bundle).encode() not in content, path


@pytest.mark.parametrize(("packing", "nominal"), [("2bit", 2.0), ("base3", 1.6)])
def test_bits_per_weight_count_the_bytes_of_each_group(ternary_model, packing, nominal):
    lowered = lower(ternary_model, WeightFormat(packing=packing))
    bits = bits_per_weight(lowered)
    ternary = [
        module
        for name, module in lowered.named_modules()
        if name.startswith(("decoder", "memory_encoder")) and hasattr(module, "packed")
    ]
    byte_count = sum(module.packed.nbytes + module.scale.nbytes for module in ternary)
    weights = sum(module.rows * module.columns for module in ternary)
    assert bits["ternary"] == pytest.approx(8 * byte_count / weights, abs=1e-4)
    assert nominal <= bits["ternary"] < nominal * 1.05
    assert bits["embedding"] == pytest.approx(8 + 32 / ternary_model.config.text.hidden_size, abs=1e-4)
    assert 8 < bits["vision"] < 12


@pytest.mark.parametrize(("bits", "least"), [(32, 32), (16, 16), (8, 8), (4, 4)])
def test_other_widths_are_counted_as_they_lie_on_disk(ternary_model, bits, least):
    ternary_bits = bits_per_weight(lower(ternary_model, WeightFormat(bits=bits)))["ternary"]
    assert least <= ternary_bits <= least * 1.1 + 1
