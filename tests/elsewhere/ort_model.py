"""optimum's ORTModelForCausalLM runs a bundle's decoder: the tokens of the backend `ort`, without our library.

`pytest tests/elsewhere/ort_model.py` with MICROVLM_NATIVE=0 and BUNDLES, a folder of `--genai` bundles. optimum-onnx
needs an older transformers than this package's tests: `nox -s elsewhere` gives it an environment of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from microvlm import GenerationOptions, LoadedModel, load
from microvlm.generation import embed_prompt, generate, read_slot, teacher_force

ROOT = Path(__file__).parent.parent.parent
BUNDLES = sorted(path.parent for path in Path(os.environ["BUNDLES"]).glob("*/genai_config.json"))
PROMPTS = ("what is this?", "describe the image", "whose is this?")
TOKENS = 24


@pytest.fixture(scope="module", params=BUNDLES, ids=lambda path: path.name)
def bundle(request) -> Path:
    return request.param


@pytest.fixture(scope="module")
def model(bundle) -> LoadedModel:
    return load(bundle, backend="ort")


@pytest.fixture(scope="module")
def theirs(bundle) -> ORTModelForCausalLM:
    return ORTModelForCausalLM.from_pretrained(bundle, subfolder="onnx")


def test_there_are_bundles():
    assert len(BUNDLES) >= 2


@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_gives_our_tokens(theirs, model, prompt):
    inputs = model.processor([prompt])
    options = GenerationOptions(max_new_tokens=TOKENS, stop_tokens=model.processor.stop_tokens)
    embedded = embed_prompt(model.runtime, *inputs, model.processor.image_id)
    expected = generate(model.runtime, embedded, options).tokens[0]
    ids = torch.from_numpy(inputs.input_ids)
    tokens = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS)[
        0, ids.shape[1] :
    ].tolist()
    stops = [place for place, token in enumerate(tokens) if token in model.processor.stop_tokens]
    assert (tokens[: stops[0]] if stops else tokens) == expected


def test_a_padded_batch_gives_our_tokens(theirs, model):
    inputs = model.processor(list(PROMPTS))
    assert inputs.attention_mask.min() == 0
    embedded = embed_prompt(model.runtime, *inputs, model.processor.image_id)
    expected = generate(model.runtime, embedded, GenerationOptions(max_new_tokens=8, stop_tokens=())).tokens
    ids, mask = (torch.from_numpy(part) for part in inputs[:2])
    tokens = theirs.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=-1)
    assert tokens[:, ids.shape[1] :].tolist() == expected


def test_the_logits_of_every_position_are_ours(theirs, model):
    inputs = model.processor([PROMPTS[0]])
    ids = inputs.input_ids
    first = embed_prompt(
        model.runtime, ids[:, :1], inputs.attention_mask[:, :1], None, model.processor.image_id
    )
    expected = teacher_force(model.runtime, first, np.roll(ids, -1, 1), read_slot(model.runtime, first, None))
    logits = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(inputs.attention_mask)).logits
    assert np.abs(logits.numpy() - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())


def test_the_decoder_runs_without_our_library(theirs):
    assert theirs.config.model_type in ("qwen2", "llama")
    # The backend `ort` of this program has the library off, so nothing can have loaded it.
    assert os.environ["MICROVLM_NATIVE"] == "0"
    maps = Path("/proc/self/maps")
    assert not maps.exists() or "microvlm_ops" not in maps.read_text()


def test_the_auto_classes_of_the_older_transformers_read_the_bundle_too(bundle, model):
    tokenizer = AutoTokenizer.from_pretrained(bundle, trust_remote_code=True)
    images = AutoImageProcessor.from_pretrained(bundle, trust_remote_code=True)
    config = AutoConfig.from_pretrained(bundle, trust_remote_code=True)
    assert config.get_text_config().hidden_size == model.config.text.hidden_size
    assert tokenizer(PROMPTS[0])["input_ids"] == list(model.processor.tokenizer.encode(PROMPTS[0]))
    picture = ROOT / "bench/photographs/koala.jpg"
    assert (images(picture)["pixel_values"] == model.processor.pixels(picture)[None]).all()
