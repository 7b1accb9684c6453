"""Hugging Face directories, with transformers as the oracle: equal features and logits, whatever wrote them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import tiny_config
from hf_models import BASE, TOLERANCE, save_livened, transformers, vit_options
from safetensors.torch import load_file, save_file

from microvlm.errors import UserError
from microvlm.model.pretrained.assembly import assemble
from microvlm.model.pretrained.hf_config import text_config, vision_config


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_vision_features_equal_those_of_transformers(hf_folders, name):
    root, oracles = hf_folders
    model = assemble(root / name, root / "llama", BASE)
    pixels = torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        expected = oracles[name](pixels).last_hidden_state
        assert model.config.vision.num_leading_tokens + 9 == expected.shape[1]
        torch.testing.assert_close(model.vision(pixels), expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_logits_equal_those_of_transformers(hf_folders, name):
    root, oracles = hf_folders
    model = assemble(root / "vit", root / name, BASE)
    ids = torch.randint(0, 90, (2, 11))
    with torch.no_grad():
        expected = oracles[name](ids).logits
        actual = model(model.embed(ids), torch.ones_like(ids))
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_left_padding_gives_the_logits_of_transformers_without_padding(hf_folders, name):
    root, oracles = hf_folders
    model = assemble(root / "vit", root / name, BASE)
    ids = torch.randint(0, 90, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :8] = 0, 0
    with torch.no_grad():
        actual = model(model.embed(ids), mask)
        for row, start in enumerate((0, 4, 8)):
            expected = oracles[name](ids[row : row + 1, start:]).logits[0]
            torch.testing.assert_close(actual[row, start:], expected, **TOLERANCE)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batched = oracles[name](ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(actual[mask.bool()], batched[mask.bool()], **TOLERANCE)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_one_token_at_a_time_equals_the_full_forward_of_transformers(hf_folders, name):
    root, oracles = hf_folders
    model = assemble(root / "vit", root / name, BASE)
    ids = torch.randint(0, 90, (2, 8))
    past, mask = model.empty_slot(2), torch.zeros(2, 1, dtype=torch.int64)
    with torch.no_grad():
        expected = oracles[name](ids).logits
        for step in range(8):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
            position = torch.full((2, 1), step + 1)
            logits, past = model.decode(model.embed(ids[:, step : step + 1]), mask, position, past)
            torch.testing.assert_close(logits[:, 0], expected[:, step], **TOLERANCE)
    assert past[0][0].shape[2] == 9


def test_configurations_are_derived(hf_folders):
    root, _ = hf_folders
    qwen, small = text_config(root / "qwen2"), text_config(root / "llama", sub_norm=True)
    assert (qwen.rope_theta, qwen.attention_bias, qwen.head_dim, qwen.num_key_value_heads) == (
        5e5,
        True,
        16,
        2,
    )
    assert (small.rope_theta, small.attention_bias, small.head_dim, small.sub_norm) == (1e4, False, 24, True)
    assert small.rms_norm_eps == 1e-5
    assert not vision_config(root / "vit").distillation_token
    assert vision_config(root / "deit").distillation_token
    assert vision_config(root / "deit").image_mean == (0.485, 0.456, 0.406)


def test_what_followed_a_shape_of_the_base_follows_the_new_one(hf_folders):
    root, _ = hf_folders
    text = dataclasses.replace(BASE.text, hidden_size=96, num_attention_heads=3)
    memory = dataclasses.replace(BASE.memory, code_size=96)
    default = dataclasses.replace(BASE, text=text, memory=memory, prefix_tokens=0)
    config = assemble(root / "deit", root / "qwen2", default).config
    assert (config.memory.code_size, config.memory.slots, config.prefix_tokens) == (64, 16, 8)
    assert assemble(root / "deit", root / "qwen2", BASE).config.memory.code_size == 48


def test_both_spellings_of_rope_theta_are_read(hf_folders, tmp_path):
    root, _ = hf_folders
    raw = json.loads((root / "qwen2" / "config.json").read_text())
    del raw["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**raw, "rope_theta": 1e6, "rope_scaling": None}))
    assert text_config(tmp_path).rope_theta == 1e6


def test_the_preprocessor_says_how_pixels_are_normalised(hf_folders, tmp_path):
    root, _ = hf_folders
    (tmp_path / "config.json").write_text((root / "vit" / "config.json").read_text())
    assert vision_config(tmp_path).image_mean == (0.5, 0.5, 0.5)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]})
    )
    assert vision_config(tmp_path).image_mean == (0.1, 0.2, 0.3)
    assert vision_config(tmp_path).image_std == (1.0, 2.0, 3.0)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    assert vision_config(tmp_path).image_std == (1.0, 1.0, 1.0)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": null, "image_std": 0.25, "size": 256}')
    assert vision_config(tmp_path).image_mean == (0.5, 0.5, 0.5)
    assert vision_config(tmp_path).image_std == (0.25, 0.25, 0.25)


def test_a_preprocessors_factor_is_computed_into_mean_and_deviation(hf_folders, tmp_path):
    root, _ = hf_folders
    (tmp_path / "config.json").write_text((root / "vit" / "config.json").read_text())
    levels = np.arange(256)
    for keys, scale in (({"rescale_factor": 1 / 127.5}, 1 / 127.5), ({"do_rescale": False}, 1.0)):
        document = {"image_mean": [1.0, 1.5, 2.0], "image_std": [1.0, 0.5, 0.25], **keys}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(document))
        config = vision_config(tmp_path)
        for mean, std, own_mean, own_std in zip(
            config.image_mean, config.image_std, document["image_mean"], document["image_std"], strict=True
        ):
            assert np.allclose((levels / 255 - mean) / std, (levels * scale - own_mean) / own_std, rtol=1e-12)


@pytest.mark.parametrize(
    "document", ['{"image_std": 0}', '{"image_mean": ["a"]}', "[1]", '{"do_normalize": 1}']
)
def test_a_damaged_preprocessor_of_an_encoder_is_one_sentence(document, hf_folders, tmp_path):
    root, _ = hf_folders
    (tmp_path / "config.json").write_text((root / "vit" / "config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(document)
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        vision_config(tmp_path)


def test_a_classifier_and_the_names_of_transformers_5_load_too(hf_folders, tmp_path):
    root, oracles = hf_folders
    torch.manual_seed(5)
    classifier = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**vit_options()))
    save_livened(classifier, tmp_path / "classifier")
    oracles["deit"].save_pretrained(tmp_path / "new", save_original_format=False)
    assert "layers.0.attention.q_proj.weight" in load_file(tmp_path / "new" / "model.safetensors")
    pixels = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        for folder, oracle in (("classifier", classifier.deit), ("new", oracles["deit"])):
            model = assemble(tmp_path / folder, root / "llama", BASE)
            torch.testing.assert_close(model.vision(pixels), oracle(pixels).last_hidden_state, **TOLERANCE)


def test_sharded_and_half_precision_weights_load(hf_folders, tmp_path):
    root, oracles = hf_folders
    oracles["qwen2"].save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    ids = torch.randint(0, 90, (1, 6))
    with torch.no_grad():
        model = assemble(root / "vit", tmp_path / "shards", BASE)
        expected = oracles["qwen2"](ids).logits
        torch.testing.assert_close(model(model.embed(ids), torch.ones_like(ids)), expected, **TOLERANCE)
    half = {key: value.bfloat16() for key, value in load_file(root / "qwen2" / "model.safetensors").items()}
    (tmp_path / "half").mkdir()
    save_file(half, tmp_path / "half" / "model.safetensors")
    (tmp_path / "half" / "config.json").write_text((root / "qwen2" / "config.json").read_text())
    model = assemble(root / "vit", tmp_path / "half", BASE)
    assert model.decoder.norm.weight.dtype == torch.float32
    assert torch.equal(model.decoder.norm.weight, half["model.norm.weight"].float())


def test_inserted_sub_norms_start_at_one_and_ternary_conversion_builds(hf_folders):
    root, _ = hf_folders
    model = assemble(root / "deit", root / "qwen2", tiny_config())
    norms = [v for k, v in model.decoder.state_dict().items() if "sub_norm" in k]
    assert len(norms) == 4
    assert all(torch.equal(norm, torch.ones_like(norm)) for norm in norms)
    assert type(model.decoder.layers[0].mlp.up_proj).__name__ == "TernaryLinear"


def test_the_memory_slot_starts_at_the_key_bias_of_the_loaded_decoder(hf_folders):
    root, oracles = hf_folders
    model = assemble(root / "vit", root / "qwen2", BASE)
    bias = model.memory_projection.linear.bias.view(2, 2, -1)
    for layer in range(2):
        assert torch.equal(bias[layer, 0], oracles["qwen2"].model.layers[layer].self_attn.k_proj.bias)
        assert not bias[layer, 1].any()
