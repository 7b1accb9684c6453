"""onnxruntime-genai runs a bundle's decoder: the tokens of the backend `ort`, with and without picture and memory.

`pytest tests/elsewhere/genai.py` with BUNDLES, a folder of `--genai` bundles: `nox -s elsewhere`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest

from microvlm import FactMemory, GenerationOptions, LoadedModel, load
from microvlm.backends import native
from microvlm.exporters.contract import kv_names
from microvlm.generation import Prompt, Timings, embed_prompt, generate, read_slot, speak

ROOT = Path(__file__).parent.parent.parent
BUNDLES = sorted(path.parent for path in Path(os.environ["BUNDLES"]).glob("*/genai_config.json"))
PICTURES = (ROOT / "bench/evalset/images/1f355.png", ROOT / "bench/photographs/koala.jpg")
PROMPTS = ("what is this?", "describe the image", "whose is this?")
TOKENS = 24
TRAINED = ("nano", "photo")
"""Models whose answers depend on picture and memory."""


@pytest.fixture(scope="module", params=BUNDLES, ids=lambda path: path.name)
def bundle(request) -> Path:
    return request.param


@pytest.fixture(scope="module")
def model(bundle) -> LoadedModel:
    return load(bundle, backend="ort")


def open_model(bundle: Path, *overlays: dict) -> og.Model:
    config = og.Config(str(bundle))
    for overlay in overlays:
        config.overlay(json.dumps({"model": {"decoder": overlay}}))
    return og.Model(config)


WITH_PREFIX = {"filename": "onnx/decoder_genai.onnx"}


@pytest.fixture(scope="module")
def prefixed(bundle) -> og.Model:
    return open_model(bundle, WITH_PREFIX)


def run(
    model: og.Model, ids: np.ndarray, inputs: dict[str, np.ndarray]
) -> tuple[list[list[int]], og.Generator]:
    """Greedy tokens after the prompts int64 [B, S], and the generator."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=ids.shape[1] + TOKENS, batch_size=len(ids))
    generator = og.Generator(model, params)
    for name, value in inputs.items():
        generator.set_model_input(name, value)
    generator.append_tokens(ids.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[ids.shape[1] :].tolist() for row in range(len(ids))], generator


def answer(tokens: list[int], model: LoadedModel) -> list[int]:
    """The tokens before the first stop token."""
    stops = [place for place, token in enumerate(tokens) if token in model.processor.stop_tokens]
    return tokens[: stops[0]] if stops else tokens


def ours(model: LoadedModel, prompt: Prompt, memory=None) -> list[list[int]]:
    options = GenerationOptions(max_new_tokens=TOKENS, stop_tokens=model.processor.stop_tokens)
    return generate(model.runtime, prompt, options, memory).tokens


def nothing(model: LoadedModel) -> dict[str, np.ndarray]:
    """The inputs of the decoder with a prefix, for text without a memory."""
    text = model.config.text
    slot = np.zeros((1, text.num_key_value_heads, 1, text.head_dim), np.float32)
    return {
        "image_features": np.zeros((1, model.config.prefix_tokens, text.hidden_size), np.float32),
        "memory_visible": np.zeros((1, 1), np.int64),
        "encode_memory": np.zeros(1, np.int64),
        **dict.fromkeys(kv_names("memory_kv", text.num_hidden_layers), slot),
    }


def test_there_are_bundles():
    assert len(BUNDLES) >= 2


@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_gives_our_tokens_without_any_input_of_ours(bundle, model, prompt):
    inputs = model.processor([prompt])
    expected = ours(model, embed_prompt(model.runtime, *inputs, model.processor.image_id))[0]
    tokens, _ = run(open_model(bundle), inputs.input_ids, {})
    assert answer(tokens[0], model) == expected


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_picture_is_a_prefix(prefixed, model, prompt):
    answers = []
    for picture in PICTURES:
        inputs = model.processor([prompt], [[picture]])
        expected = ours(model, embed_prompt(model.runtime, *inputs, model.processor.image_id))[0]
        features = model.runtime.encode_image(inputs.pixel_values)
        tokens, _ = run(prefixed, inputs.input_ids, {**nothing(model), "image_features": features})
        assert answer(tokens[0], model) == expected
        answers.append(expected)
    tokens, _ = run(prefixed, model.processor([prompt]).input_ids, nothing(model))
    inputs = model.processor([prompt])
    assert (
        answer(tokens[0], model)
        == ours(model, embed_prompt(model.runtime, *inputs, model.processor.image_id))[0]
    )
    assert answers[0] != answers[1] or prompt != PROMPTS[0] or model.config.name not in TRAINED


def test_the_memory_goes_in_as_a_slot_and_a_prompts_latent_comes_out(prefixed, model):
    facts = FactMemory(model)
    facts.write("whose is this?", "zuzana", PICTURES[0])
    inputs = model.processor(["whose is this?"], [[PICTURES[0]]])
    prompt = embed_prompt(model.runtime, *inputs, model.processor.image_id)
    slot = read_slot(model.runtime, prompt, facts.memory.states)
    names = kv_names("memory_kv", model.config.text.num_hidden_layers)
    given = {
        **nothing(model),
        "image_features": model.runtime.encode_image(inputs.pixel_values),
        **dict(zip(names, (part.numpy() for part in slot.slot), strict=True)),
    }
    latent, key = model.runtime.memory_encode(*prompt)
    options = GenerationOptions(max_new_tokens=TOKENS, stop_tokens=model.processor.stop_tokens)
    answers = []
    for visible in (0, 1):
        chosen = slot._replace(slot_mask=np.array([visible]))
        expected = speak(model.runtime, prompt, options, chosen, None, Timings()).tokens[0]
        given |= {"memory_visible": np.array([[visible]]), "encode_memory": np.ones(1, np.int64)}
        params = og.GeneratorParams(prefixed)
        params.set_search_options(max_length=inputs.input_ids.shape[1] + TOKENS)
        generator = og.Generator(prefixed, params)
        for name, value in given.items():
            generator.set_model_input(name, value)
        generator.append_tokens(inputs.input_ids.astype(np.int32))
        assert np.abs(generator.get_output("memory_code") - latent).max() < 1e-5
        assert np.abs(generator.get_output("memory_key") - key).max() < 1e-5
        while not generator.is_done():
            generator.generate_next_token()
        assert generator.get_output("memory_code").shape == (0, model.config.memory.code_size)
        tokens = generator.get_sequence(0)[inputs.input_ids.shape[1] :].tolist()
        assert answer(tokens, model) == expected
        answers.append(expected)
    assert answers[0] != answers[1] or model.config.name not in TRAINED


def test_the_native_library_gives_the_same_tokens(bundle, model):
    library = native.library_path()
    if library is None:
        pytest.skip("this package has no native library")
    inputs = model.processor([PROMPTS[0]])
    options = {"session_options": {"custom_ops_library": str(library)}}
    fast, _ = run(open_model(bundle, options), inputs.input_ids, {})
    assert fast == run(open_model(bundle), inputs.input_ids, {})[0]


def test_the_tokenizer_of_the_bundle_gives_our_tokens(bundle, model):
    tokenizer = og.Tokenizer(og.Model(str(bundle)))
    for text in ("what is this?", "a cat, a dog"):
        assert tokenizer.encode(text).tolist() == list(model.processor.tokenizer.encode(text))
