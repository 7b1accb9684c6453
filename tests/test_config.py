"""Configurations: presets, JSON round trips, and a sentence for every mistake."""

import dataclasses
import json
import subprocess
import sys

import pytest
from conftest import tiny_config

from microvlm.config import (
    MemoryConfig,
    MicroVLMConfig,
    PromptConfig,
    QuantizationConfig,
    TextConfig,
    VisionConfig,
)
from microvlm.errors import UserError
from microvlm.presets import preset, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_survives_json(name, tmp_path):
    preset(name).save(tmp_path)
    assert MicroVLMConfig.load(tmp_path) == preset(name)
    assert preset(name).name == name


def test_presets_are_the_sizes_of_the_table():
    full, small = preset("full"), preset("small")
    assert (full.text.hidden_size, full.text.num_hidden_layers, full.text.vocab_size) == (896, 24, 151_936)
    assert full.memory_kv_outputs == 24 * 2 * 2 * 64 == 6144
    assert (full.memory.slots, full.memory.code_size) == (512, 896)
    assert (small.text.hidden_size, small.text.num_key_value_heads, small.memory.code_size) == (576, 3, 576)
    assert full.prefix_tokens == small.prefix_tokens == 25
    assert preset("nano").quantization.is_ternary


@pytest.mark.parametrize(("side", "patch", "tokens"), [(224, 16, 25), (32, 16, 8), (64, 8, 8), (384, 14, 64)])
def test_prefix_tokens_are_an_eighth_of_the_patches_within_8_and_64(side, patch, tokens):
    side -= side % patch
    vision = VisionConfig(image_size=side, patch_size=patch)
    assert MicroVLMConfig(vision=vision).prefix_tokens == tokens


def test_an_unknown_preset_is_refused_with_the_names():
    with pytest.raises(UserError, match="nano, small, full"):
        preset("huge")


@pytest.mark.parametrize(
    ("part", "changes", "sentence"),
    [
        (MemoryConfig, {"slots": 896}, "fewer than code_size"),
        (MemoryConfig, {"slots": 900}, "fewer than code_size"),
        (MemoryConfig, {"observation_variance": 0.0}, "observation_variance must be positive"),
        (VisionConfig, {"image_size": 225}, "multiple of patch_size"),
        (VisionConfig, {"num_attention_heads": 5}, "multiple of num_attention_heads"),
        (VisionConfig, {"patch_size": 0}, "patch_size must be positive"),
        (VisionConfig, {"image_mean": (0.5,)}, "image_mean must have three"),
        (TextConfig, {"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        (TextConfig, {"head_dim": 63}, "even"),
        (TextConfig, {"hidden_size": 64.5}, "hidden_size must be a whole number"),
        (TextConfig, {"hidden_size": True}, "hidden_size must be a whole number"),
        (TextConfig, {"attention_bias": 1}, "attention_bias must be true or false"),
        (TextConfig, {"rope_theta": "1e6"}, "rope_theta must be a number"),
        (QuantizationConfig, {"decoder_bits": 2}, "32 or 1.58"),
        (QuantizationConfig, {"vision_bits": 4}, "32 or 8"),
        (QuantizationConfig, {"embedding_bits": 16}, "32 or 8"),
        (PromptConfig, {"template": None}, "template must be text"),
        (MicroVLMConfig, {"prefix_tokens": -1}, "prefix_tokens must be positive"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(part, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        part(**changes)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "not valid JSON"),
        ("\ufeff{", "not valid JSON"),
        ("[]", "not a MicroVLM configuration"),
        ('{"model_type": "llama"}', "not a MicroVLM configuration"),
        ('{"model_type": "microvlm", "format": 2}', "newer microvlm"),
        ('{"model_type": "microvlm", "format": "x"}', "newer microvlm"),
        ('{"model_type": "microvlm", "format": 1, "wings": 2}', "wings"),
        ('{"model_type": "microvlm", "format": 1, "text": {"wings": 2}}', "wings"),
        ('{"model_type": "microvlm", "format": 1, "text": []}', "'text' must be an object"),
        (
            '{"model_type": "microvlm", "format": 1, "memory": {"slots": null}}',
            "slots must be a whole number",
        ),
    ],
)
def test_a_file_that_is_no_configuration_is_a_sentence(tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=sentence) as caught:
        MicroVLMConfig.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_configuration_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        MicroVLMConfig.load(tmp_path)


def test_keys_that_a_file_leaves_out_take_their_defaults():
    config = MicroVLMConfig.from_dict({"model_type": "microvlm", "format": 1, "text": {"vocab_size": 77}})
    assert config.text == dataclasses.replace(TextConfig(), vocab_size=77)


def test_reading_does_not_change_what_was_read():
    raw = tiny_config().to_dict()
    before = json.dumps(raw)
    assert MicroVLMConfig.from_dict(raw) == tiny_config()
    assert json.dumps(raw) == before


def test_what_runs_on_a_device_imports_no_torch():
    modules = "microvlm.config, microvlm.formats.packing, microvlm.formats.op_table, microvlm.runtime, microvlm.errors"
    code = f"import sys, {modules}; print(sorted({{'torch', 'transformers', 'onnx'}} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
