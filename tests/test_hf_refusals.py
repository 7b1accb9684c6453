"""Hugging Face directories that do not fit, or would compute otherwise: a sentence each."""

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from hf_models import BASE, altered
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from microvlm.config import TextConfig, VisionConfig
from microvlm.errors import UserError
from microvlm.model.pretrained.assembly import assemble
from microvlm.model.pretrained.hf_config import text_config, vision_config

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("part", "drop", "add", "sentence"),
    [
        ("qwen2", ["model.layers.1.mlp.up_proj.weight"], {}, "lacks 'model.layers.1.mlp.up_proj.weight'"),
        ("qwen2", [], {"model.extra.weight": torch.ones(2)}, "unexpected 'model.extra.weight'"),
        ("qwen2", [], {"model.norm.weight": torch.ones(3)}, r"'model.norm.weight' is \(3,\)"),
        ("qwen2", [], {"model.norm.weight": torch.ones(64, dtype=torch.int8)}, "only float weights"),
        ("qwen2", [], {"lm_head.weight": torch.ones(120, 64)}, "only tied output heads"),
        ("deit", ["embeddings.cls_token"], {}, "lacks 'embeddings.cls_token'"),
        ("deit", [], {"embeddings.extra": torch.ones(1)}, "unexpected 'embeddings.extra'"),
    ],
)
def test_a_key_that_does_not_fit_is_named(hf_folders, tmp_path, part, drop, add, sentence):
    root, _ = hf_folders
    folder = altered(root / part, tmp_path / "altered", drop, add)
    parts = {"deit": root / "deit", "qwen2": root / "qwen2", part: folder}
    with pytest.raises(UserError, match=sentence):
        assemble(parts["deit"], parts["qwen2"], BASE)


def test_a_tied_head_that_was_saved_twice_is_accepted(hf_folders, tmp_path):
    root, _ = hf_folders
    embedding = load_file(root / "qwen2" / "model.safetensors")["model.embed_tokens.weight"]
    folder = altered(root / "qwen2", tmp_path / "twice", add={"lm_head.weight": embedding.clone()})
    model = assemble(root / "vit", folder, BASE)
    assert torch.equal(model.embedding.weight, embedding)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("qwen2", {"tie_word_embeddings": False}, "not tied"),
        ("qwen2", {"use_sliding_window": True}, "sliding-window"),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding-window"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rotary"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary"),
        ("llama", {"attention_bias": True}, "attention biases"),
        ("llama", {"mlp_bias": True}, "MLP"),
        ("llama", {"hidden_act": "gelu"}, "silu"),
        ("llama", {"model_type": "gemma"}, "'gemma' decoder"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'"),
        ("llama", {"hidden_size": None}, "'hidden_size' must be a whole number, not null"),
        ("vit", {"model_type": "clip"}, "'clip' encoder"),
        ("vit", {"hidden_act": "quick_gelu"}, "gelu"),
        ("vit", {"qkv_bias": False}, "biases"),
        ("vit", {"num_channels": 1}, "3 channels"),
        ("vit", {"image_size": [224, 192]}, "square"),
    ],
)
def test_an_architecture_that_would_compute_otherwise_is_refused(
    hf_folders, tmp_path, name, change, sentence
):
    root, _ = hf_folders
    raw = json.loads((root / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    read_config = vision_config if name == "vit" else text_config
    with pytest.raises(UserError, match=sentence):
        read_config(tmp_path)


def test_pickled_missing_and_damaged_weights_are_refused(hf_folders, tmp_path):
    root, _ = hf_folders
    (tmp_path / "config.json").write_text((root / "qwen2" / "config.json").read_text())
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        assemble(root / "vit", tmp_path, BASE)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds 0 weights"):
        assemble(root / "vit", tmp_path, BASE)
    (tmp_path / "model.safetensors").write_bytes((root / "qwen2" / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        assemble(root / "vit", tmp_path, BASE)


def test_an_index_that_points_outside_or_nowhere_is_refused(hf_folders, tmp_path):
    root, _ = hf_folders
    (tmp_path / "config.json").write_text((root / "qwen2" / "config.json").read_text())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="beside it"):
        assemble(root / "vit", tmp_path, BASE)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(UserError, match=r"model-00001-of-00001\.safetensors is missing"):
        assemble(root / "vit", tmp_path, BASE)
    index.write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        assemble(root / "vit", tmp_path, BASE)


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        assemble(tmp_path, tmp_path, BASE)


NAMES = ["qwen2", "llama", "vit", "deit"]


def read_changed(root: Path, folder: Path, name: str, change: dict) -> VisionConfig | TextConfig:
    raw = json.loads((root / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | change))
    return (vision_config if name in ("vit", "deit") else text_config)(folder)


@pytest.mark.parametrize(
    ("name", "change", "key", "value"),
    [
        ("qwen2", {"rms_norm_eps": None}, "rms_norm_eps", 1e-6),
        ("llama", {"rope_theta": None, "rope_parameters": None}, "rope_theta", 10_000.0),
        ("llama", {"rope_scaling": None, "partial_rotary_factor": None}, "attention_bias", False),
        ("qwen2", {"num_key_value_heads": None}, "num_key_value_heads", 4),
        ("qwen2", {"max_position_embeddings": None}, "max_position_embeddings", 32_768),
        ("qwen2", {"use_sliding_window": None, "layer_types": None}, "attention_bias", True),
        ("qwen2", {"quantization_config": None, "hidden_act": None}, "attention_bias", True),
        ("vit", {"layer_norm_eps": None}, "layer_norm_eps", 1e-12),
        ("vit", {"qkv_bias": None, "num_channels": None, "hidden_act": None}, "distillation_token", False),
        ("vit", {"image_size": [32, 32], "patch_size": 8}, "image_size", 32),
        ("deit", {"a later key": {"deep": [1]}}, "distillation_token", True),
    ],
)
def test_null_is_the_default_and_unknown_keys_are_skipped(hf_folders, tmp_path, name, change, key, value):
    assert getattr(read_changed(hf_folders[0], tmp_path, name, change), key) == value


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("qwen2", {"vocab_size": None}, "'vocab_size' must be a whole number, not null"),
        ("qwen2", {"vocab_size": "100"}, "'vocab_size' must be a whole number, not text"),
        ("qwen2", {"vocab_size": 10**9}, "'vocab_size' must be a whole number <= 16777216"),
        ("qwen2", {"num_hidden_layers": 10**9}, "'num_hidden_layers' must be a whole number <= 1024"),
        ("qwen2", {"num_hidden_layers": 2.5}, "'num_hidden_layers' must be a whole number, not a number"),
        ("qwen2", {"num_attention_heads": 10**6, "head_dim": 64}, "'num_attention_heads' must be a whole number <="),
        ("qwen2", {"head_dim": 63}, "'head_dim' must be even"),
        ("qwen2", {"rms_norm_eps": "1e-6"}, "'rms_norm_eps' must be a number or null, not text"),
        ("qwen2", {"rms_norm_eps": -1}, "'rms_norm_eps' must be a number >= 1e-30"),
        ("qwen2", {"rope_theta": [1], "rope_parameters": None}, "'rope_theta' must be a number or null, not a list"),
        ("qwen2", {"rope_parameters": 5}, "'rope_parameters' must be an object or null, not a whole number"),
        ("qwen2", {"layer_types": [None]}, "'layer_types[0]' must be text, not null"),
        ("qwen2", {"model_type": ["qwen2"]}, "'model_type' must be text or null, not a list"),
        ("qwen2", {"model_type": "\x1b[31m" + "x" * 999}, "a '\\x1b[31mxxxx"),
        ("vit", {"image_size": [32]}, "'image_size' must be a list of length"),
        ("vit", {"image_size": {}}, "'image_size' must be"),
        ("vit", {"image_size": 12_000}, "'image_size' must be a whole number <= 2048"),
        ("vit", {"image_size": [32, 64]}, "is not square"),
        ("vit", {"num_attention_heads": 5}, "must be a multiple of 'num_attention_heads'"),
        ("vit", {"layer_norm_eps": 1e999}, "config.json"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_a_sentence_with_the_file_and_the_key(hf_folders, tmp_path, name, change, part):
    with pytest.raises(UserError) as caught:
        read_changed(hf_folders[0], tmp_path, name, change)
    sentence = str(caught.value)
    assert sentence.startswith(str(tmp_path / "config.json"))
    assert part in sentence
    assert sentence.isprintable()
    assert len(sentence) < len(str(tmp_path)) + 220


@given(name=st.sampled_from(NAMES), key=st.text(max_size=9), number=st.integers(0, 99), value=JSON_VALUES)
def test_any_value_in_place_of_any_other_is_a_configuration_or_a_sentence(
    hf_folders, name, key, number, value
):
    root, _ = hf_folders
    keys = [*json.loads((root / name / "config.json").read_text()), key]
    folder = root / "changed"
    folder.mkdir(exist_ok=True)
    try:
        config = read_changed(root, folder, name, {keys[number % len(keys)]: value})
    except UserError as error:
        sentence = str(error)
    else:
        assert isinstance(config, VisionConfig | TextConfig)
        return
    assert sentence.startswith(str(folder))
    assert sentence.isprintable()


def test_sizes_are_held_against_the_weights_before_a_model_is_built(hf_folders, tmp_path):
    root, _ = hf_folders
    for name, change in (
        ("qwen2", {"vocab_size": 16_000_000}),
        ("qwen2", {"num_hidden_layers": 1024, "layer_types": None}),
        ("vit", {"hidden_size": 200_000, "intermediate_size": 200_000}),
    ):
        folder = tmp_path / f"{name}-{next(iter(change))}"
        shutil.copytree(root / name, folder)
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | change))
        parts = [folder, root / "qwen2"] if name == "vit" else [root / "vit", folder]
        tracemalloc.start()
        with pytest.raises(UserError, match=r"weights, and its config\.json describes [\d,]{9,}"):
            assemble(*parts, BASE)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
        tracemalloc.stop()
