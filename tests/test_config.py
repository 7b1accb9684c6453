"""Configurations: presets, JSON round trips, and a sentence for every mistake."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from microvlm.config import (
    AnswersConfig,
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
    with pytest.raises(UserError, match="nano, photo, small, full"):
        preset("huge")


@pytest.mark.parametrize(
    ("part", "changes", "sentence"),
    [
        (MemoryConfig, {"slots": 896}, "'slots' must be fewer than 'code_size'"),
        (MemoryConfig, {"slots": 900}, "'slots' must be fewer than 'code_size'"),
        (MemoryConfig, {"slots": None}, "'slots' must be a whole number, not null"),
        (MemoryConfig, {"observation_variance": 0.0}, "'observation_variance' must be a number >= 1e-12"),
        (MemoryConfig, {"scope_threshold": 1.5}, "'scope_threshold' must be a number <= 1.0"),
        (MemoryConfig, {"readout_size": -1}, "'readout_size' must be a whole number >= 0"),
        (MemoryConfig, {"encoder_layers": 10**9}, "'encoder_layers' must be a whole number <= 1024"),
        (VisionConfig, {"image_size": 225}, "'image_size' must be a multiple of 'patch_size'"),
        (VisionConfig, {"image_size": 12_000}, "'image_size' must be a whole number <= 2048"),
        (VisionConfig, {"image_size": 2048, "patch_size": 4}, "more than 65,536 patches"),
        (VisionConfig, {"num_attention_heads": 5}, "must be a multiple of 'num_attention_heads'"),
        (VisionConfig, {"patch_size": 0}, "'patch_size' must be a whole number >= 1"),
        (VisionConfig, {"image_mean": (0.5,)}, "'image_mean' must be a list of length 3"),
        (VisionConfig, {"image_mean": (0.5, None, 1)}, "'image_mean[1]' must be a number, not null"),
        (VisionConfig, {"image_mean": (0.5, math.nan, 1)}, "a number that is not finite"),
        (VisionConfig, {"image_std": (0.5, 0.5, 0)}, "'image_std[2]' must be a number >= 1e-06"),
        (VisionConfig, {"layer_norm_eps": 0}, "'layer_norm_eps' must be a number >= 1e-30"),
        (VisionConfig, {"layer_norm_eps": math.inf}, "a number that is not finite"),
        (TextConfig, {"num_key_value_heads": 3}, "must be a multiple of 'num_key_value_heads'"),
        (TextConfig, {"num_hidden_layers": 2**40}, "'num_hidden_layers' must be a whole number <= 1024"),
        (TextConfig, {"vocab_size": 10**9}, "'vocab_size' must be a whole number <= 16777216"),
        (TextConfig, {"head_dim": 63}, "even"),
        (TextConfig, {"hidden_size": 64.5}, "'hidden_size' must be a whole number, not a number"),
        (TextConfig, {"hidden_size": True}, "'hidden_size' must be a whole number, not true or false"),
        (TextConfig, {"attention_bias": 1}, "'attention_bias' must be true or false, not a whole number"),
        (TextConfig, {"rope_theta": "1e6"}, "'rope_theta' must be a number, not text"),
        (TextConfig, {"rms_norm_eps": 2}, "'rms_norm_eps' must be a number <= 1.0"),
        (QuantizationConfig, {"decoder_bits": 2}, "32 or 1.58"),
        (QuantizationConfig, {"vision_bits": 4}, "32 or 8"),
        (QuantizationConfig, {"embedding_bits": 16}, "32 or 8"),
        (QuantizationConfig, {"embedding_bits": None}, "'embedding_bits' must be a number, not null"),
        (PromptConfig, {"template": None}, "'template' must be text, not null"),
        (PromptConfig, {"template": "{prompt}"}, "'template' must have '<image>' once"),
        (PromptConfig, {"template": "<image><image>{prompt}"}, "'template' must have '<image>' once"),
        (PromptConfig, {"template": "<image>?"}, "'template' must have '{prompt}' once"),
        (PromptConfig, {"image_token": "<picture>"}, "'template' must have '<picture>' once"),
        (PromptConfig, {"image_token": ""}, "'image_token' must be text of length >= 1"),
        (PromptConfig, {"caption_prompt": "a" * 20_001}, "'caption_prompt' must be text of length <= 20000"),
        (AnswersConfig, {"points": (-1, -2), "values": (0, 1)}, "'points' must increase"),
        (AnswersConfig, {"points": (-1, -1), "values": (0, 1)}, "'points' must increase"),
        (AnswersConfig, {"points": (-2, -1), "values": (0.5, 0.4)}, "'values' must not decrease"),
        (AnswersConfig, {"points": (-2, -1), "values": (0.5,)}, "'points' and 'values' differ in length"),
        (AnswersConfig, {"points": (-2, 0.5), "values": (0, 1)}, "'points[1]' must be a number <= 0.0"),
        (AnswersConfig, {"points": (-2, -1), "values": (0, 1.5)}, "'values[1]' must be a number <= 1.0"),
        (AnswersConfig, {"points": (-math.inf, -1), "values": (0, 1)}, "a number that is not finite"),
        (AnswersConfig, {"threshold": 0.5}, "'threshold' needs 'points' and 'values'"),
        (AnswersConfig, {"decline": ""}, "'decline' must be text of length >= 1"),
        (AnswersConfig, {"declining": ("\x1b[31m",)}, "a declining text cannot be printed"),
        (MicroVLMConfig, {"answers": 1}, "'answers' must be an object or null, not a whole number"),
        (MicroVLMConfig, {"prefix_tokens": -1}, "'prefix_tokens' must be a whole number >= 0"),
        (MicroVLMConfig, {"prefix_tokens": 10**6}, "'prefix_tokens' must be a whole number <= 16384"),
        (MicroVLMConfig, {"name": "\x1b[31m"}, "'name' has characters that cannot be printed"),
        (MicroVLMConfig, {"text": {"vocab_size": -1}}, "'text.vocab_size' must be a whole number >= 1"),
        (MicroVLMConfig, {"vision": 5}, "'vision' must be an object, not a whole number"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(part, changes, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        part(**changes)
    assert str(caught.value).startswith("bad configuration")


def test_a_configuration_of_a_program_gets_the_values_that_a_file_would_give():
    vision = VisionConfig(image_mean=[0, 0, np.float64(0.5)], layer_norm_eps=np.float64(1e-6))
    assert vision.image_mean == (0.0, 0.0, 0.5)
    assert json.dumps(dataclasses.asdict(vision))
    assert MicroVLMConfig(memory={"slots": 3, "code_size": 4}).memory == MemoryConfig(3, 4)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", " is not valid JSON"),
        ("\ufeff{", " is not valid JSON"),
        ('{"model_type": "microvlm", "name": "\\ud800"}', " is not valid JSON"),
        ('{"model_type": "microvlm", "memory": {"observation_variance": NaN}}', " is not valid JSON"),
        ('{"model_type": "microvlm", "memory": {"observation_variance": 1e999}}', "number out of range"),
        ("[]", ": the document must be an object, not a list"),
        ("{}", " is not a MicroVLM configuration"),
        ('{"a":' * 100_000, " is nested too deeply"),
        (" " * 1_000_001, " has more than 1,000,000 bytes"),
        ('{"model_type": "llama"}', " is not a MicroVLM configuration"),
        ('{"model_type": null}', " is not a MicroVLM configuration"),
        ('{"model_type": "microvlm", "format": 2, "text": 7}', " was written by a newer microvlm"),
        ('{"model_type": "microvlm", "format": "x"}', ": 'format' must be a whole number, not text"),
        ('{"model_type": "microvlm", "format": null}', ": 'format' must be a whole number, not null"),
        ('{"model_type": "microvlm", "format": ' + "9" * 5000 + "}", "integer value out of range"),
        ('{"model_type": "microvlm", "wings": 2}', ": 'wings' is not known to this version: upgrade"),
        ('{"model_type": "microvlm", "text": {"wings": 2}}', ": 'text.wings' is not known to this version"),
        ('{"model_type": "microvlm", "text": []}', ": 'text' must be an object, not a list"),
        ('{"model_type": "microvlm", "text": null}', ": 'text' must be an object, not null"),
        (
            '{"model_type": "microvlm", "memory": {"slots": null}}',
            ": 'memory.slots' must be a whole number, not null",
        ),
        (
            '{"model_type": "microvlm", "memory": {"slots": 9, "code_size": 9}}',
            ": 'memory': 'slots' must be fewer than 'code_size': correct it",
        ),
        (
            '{"model_type": "microvlm", "quantization": {"vision_bits": 4}}',
            ": 'quantization': 'vision_bits' must be 32 or 8: correct it",
        ),
        (
            '{"model_type": "microvlm", "answers": {"points": [-1, -2], "values": [0, 1]}}',
            ": 'answers': 'points' must increase: correct it",
        ),
        (
            '{"model_type": "microvlm", "answers": {"wings": 2}}',
            ": 'answers.wings' is not known to this version",
        ),
        ('{"model_type": "microvlm", "name": "\\u001b"}', ": the document: 'name' has characters"),
    ],
)
def test_a_file_that_is_no_configuration_is_a_sentence(tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        MicroVLMConfig.load(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "config.json"))
    assert sentence in message
    assert message.isprintable()
    assert len(message) < len(str(tmp_path)) + 200


CALIBRATED = tiny_config(answers=AnswersConfig((-4.0, -1.0), (0.25, 0.75), 0.5))


def test_the_map_of_confidence_is_linear_between_its_points_and_constant_outside():
    answers = CALIBRATED.answers
    expected = {-9.0: 0.25, -4.0: 0.25, -2.5: 0.5, -1.0: 0.75, 0.0: 0.75}
    assert {point: answers.confidence(point) for point in expected} == expected
    assert AnswersConfig((-2.0,), (0.3,)).confidence(-7) == 0.3
    assert AnswersConfig().confidence(-1) is None


@given(
    st.lists(st.integers(-(10**9), 0).map(lambda n: n / 1000), min_size=1, max_size=20, unique=True),
    st.data(),
)
def test_a_surer_answer_never_has_less_confidence(points, data):
    values = data.draw(st.lists(st.floats(0, 1), min_size=len(points), max_size=len(points)))
    answers = AnswersConfig(tuple(sorted(points)), tuple(sorted(values)))
    places = sorted(data.draw(st.lists(st.floats(-1e7, 0), min_size=2, max_size=20)))
    confidences = [answers.confidence(place) for place in places]
    # Interpolation rounds: by an ulp or so of a value.
    assert all(a <= b + 1e-12 for a, b in pairwise(confidences))


def test_an_answer_declines_in_its_own_words_whatever_the_case_and_the_full_stop():
    answers = AnswersConfig(declining=("I don't see one",), decline="no idea")
    for text in ("I don't see one", "i don\u2019t  see one.", "No idea."):
        assert answers.is_declining(text)
    for text in ("I don't see one here", "", "one"):
        assert not answers.is_declining(text)


def test_a_model_that_was_never_calibrated_has_no_key_in_its_file():
    assert "answers" not in tiny_config().to_dict()
    assert CALIBRATED.to_dict()["answers"]["threshold"] == 0.5
    assert MicroVLMConfig.from_dict(json.loads(json.dumps(CALIBRATED.to_dict()))) == CALIBRATED


PLACES = [
    (part, key)
    for part, values in CALIBRATED.to_dict().items()
    for key in (values if isinstance(values, dict) else [None])
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@given(place=st.sampled_from(PLACES), value=VALUES)
def test_any_value_in_place_of_any_other_is_a_configuration_or_a_sentence(place, value):
    raw = CALIBRATED.to_dict()
    part, key = place
    if key is None:
        raw[part] = value
    else:
        raw[part][key] = value
    try:
        config = MicroVLMConfig.from_dict(raw, "a/config.json")
    except UserError as error:
        sentence = str(error)
    else:
        assert MicroVLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        return
    assert sentence.startswith("a/config.json")
    assert sentence.isprintable()
    assert len(sentence) < 250


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
