"""Hugging Face directories that do not fit, or would compute otherwise: a sentence each."""

import json

import pytest
import torch
from hf_models import BASE, altered
from safetensors.torch import load_file

from microvlm.errors import UserError
from microvlm.model.hf_config import text_config, vision_config
from microvlm.model.hf_loading import assemble


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
        ("llama", {"quantization_config": {"quant_method": "bitnet"}}, "quantised"),
        ("llama", {"hidden_size": None}, "'hidden_size' is missing"),
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
    with pytest.raises(UserError, match="never loaded"):
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
    with pytest.raises(UserError, match="not readable JSON"):
        assemble(root / "vit", tmp_path, BASE)


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        assemble(tmp_path, tmp_path, BASE)
