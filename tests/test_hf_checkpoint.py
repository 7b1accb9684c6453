"""A checkpoint assembled from Hugging Face directories: the decoder's tokenizer, its vocabulary and the prompt."""

import json
from pathlib import Path

import pytest
import torch
from hf_models import BASE, altered
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from microvlm.errors import UserError
from microvlm.inputs.processor import Processor
from microvlm.model.microvlm import MicroVLM
from microvlm.model.pretrained.assembly import assemble, assemble_checkpoint
from microvlm.model.pretrained.chat_template import TemplateError, render

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def save_tokenizer(folder: Path, tokens=TOKENS, chat: str | None = CHATML, **config) -> None:
    """A byte-level tokenizer of the first bytes, `tokens` and a tokenizer_config.json."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:80]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(tokens))
    tokenizer.save(str(folder / "tokenizer.json"))
    document = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **config}
    if chat is not None:
        document["chat_template"] = chat
    (folder / "tokenizer_config.json").write_text(json.dumps(document))


@pytest.fixture
def decoder(hf_folders, tmp_path) -> Path:
    """A copy of the small Llama with a tokenizer that leaves it some rows."""
    folder = altered(hf_folders[0] / "llama", tmp_path / "decoder")
    save_tokenizer(folder)
    return folder


def refusal(root: Path, decoder: Path, target: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        assemble_checkpoint(root / "vit", decoder, BASE, target, **options)
    assert not target.exists()
    return str(caught.value)


def test_an_assembled_checkpoint_answers_with_the_decoders_tokenizer(hf_folders, decoder, tmp_path):
    root, _ = hf_folders
    assemble_checkpoint(root / "vit", decoder, BASE, tmp_path / "made", seed=3)
    model = MicroVLM.from_pretrained(tmp_path / "made")
    in_memory = assemble(root / "vit", decoder, BASE, seed=3)
    assert model.config.text.vocab_size == 90
    stored = model.state_dict()
    assert all(torch.equal(stored[name], value) for name, value in in_memory.state_dict().items())
    picture = Image.new("RGB", (30, 20), "red")
    assert len(model.generate([picture], ["what is this"], max_new_tokens=3)) == 1


def test_a_folder_of_another_model_is_not_replaced(hf_folders, decoder):
    with pytest.raises(UserError, match="not a MicroVLM"):
        assemble_checkpoint(hf_folders[0] / "vit", decoder, BASE, decoder)


def test_the_prompt_is_the_text_that_transformers_renders(hf_folders, decoder, tmp_path):
    assemble_checkpoint(hf_folders[0] / "vit", decoder, BASE, tmp_path / "made")
    processor = Processor.from_pretrained(tmp_path / "made")
    prompt = processor.config.prompt
    oracle = PreTrainedTokenizerFast.from_pretrained(tmp_path / "made")
    message = {"role": "user", "content": "<image>what is it?"}
    expected = oracle.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert prompt.template.replace("{prompt}", "what is it?") == expected
    assert "Be brief." in prompt.template
    assert (prompt.image_token, prompt.eos_token, prompt.pad_token) == (
        "<image>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    ids = processor.prompt_ids("what is it?", images=1)
    assert ids == oracle(expected.replace("<image>", "<image>" * BASE.prefix_tokens))["input_ids"]
    assert ids.count(processor.image_id) == BASE.prefix_tokens


def test_the_chat_template_travels_with_the_checkpoint_and_a_file_comes_first(hf_folders, decoder, tmp_path):
    (decoder / "chat_template.jinja").write_text(CHATML.replace("Be brief.", "Be kind."))
    assemble_checkpoint(hf_folders[0] / "vit", decoder, BASE, tmp_path / "made")
    document = json.loads((tmp_path / "made" / "tokenizer_config.json").read_text())
    assert "Be kind." in document["chat_template"]
    assert "Be kind." in MicroVLM.from_pretrained(tmp_path / "made").config.prompt.template


def test_the_end_of_a_turn_ends_an_answer_and_so_do_the_decoders_own_ends(hf_folders, decoder, tmp_path):
    (decoder / "generation_config.json").write_text(json.dumps({"eos_token_id": [82]}))
    save_tokenizer(decoder, eos_token={"content": "<|endoftext|>"})
    assemble_checkpoint(hf_folders[0] / "vit", decoder, BASE, tmp_path / "made")
    processor = Processor.from_pretrained(tmp_path / "made")
    assert processor.config.prompt.eos_token == "<|im_end|>", "a base model's file names the end of texts"
    assert set(processor.stop_tokens) == {81, 82}


def test_a_decoder_without_a_chat_template_gets_the_plain_one(hf_folders, decoder, tmp_path):
    save_tokenizer(decoder, chat=None, add_bos_token=True, bos_token="<|im_start|>")
    assemble_checkpoint(hf_folders[0] / "vit", decoder, BASE, tmp_path / "made")
    template = Processor.from_pretrained(tmp_path / "made").config.prompt.template
    assert template == "<|im_start|>User: <image>{prompt}\nAssistant:"


def test_a_template_of_the_users_takes_the_place_of_the_decoders(hf_folders, decoder, tmp_path):
    save_tokenizer(decoder, tokens=(*TOKENS, "<|image_pad|>"))
    for given, used in (
        ("Q: {prompt} A:", "Q: <|image_pad|>{prompt} A:"),
        ("<image> {prompt}", "<|image_pad|> {prompt}"),
    ):
        assemble_checkpoint(hf_folders[0] / "vit", decoder, BASE, tmp_path / "made", template=given)
        prompt = Processor.from_pretrained(tmp_path / "made").config.prompt
        assert (prompt.template, prompt.image_token) == (used, "<|image_pad|>")


@pytest.mark.parametrize(
    ("chat", "sentence"),
    [
        ("{% for %}", "cannot be rendered"),
        ("{{ raise_exception('only for tools') }}", "only for tools"),
        ("{{ messages[0].__class__.__mro__ }}", "cannot be rendered"),
        ("hello", "does not show a question once"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "does not show a question once"),
        (
            "{% for i in range(100000) %}{% for j in range(100000) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}",
            "3 seconds",
        ),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_one_sentence(
    hf_folders, decoder, tmp_path, monkeypatch, chat, sentence
):
    monkeypatch.setattr("microvlm.model.pretrained.chat_template._SECONDS", 3)
    save_tokenizer(decoder, chat=chat)
    text = refusal(hf_folders[0], decoder, tmp_path / "made")
    assert sentence in text
    assert "--prompt-template" in text


def test_a_template_is_rendered_without_pythons_attributes_and_todays_date():
    with pytest.raises(TemplateError, match="undefined"):
        render("{{ strftime_now('%Y') }}", {})
    with pytest.raises(TemplateError, match="unsafe"):
        render("{{ ''.__class__.__base__.__subclasses__() }}", {})
    assert render("{%- if true %}\n  {{ [1] | tojson }}\n{%- endif %}", {}) == "  [1]"


def test_a_vocabulary_that_is_full_grows_by_the_image_token(hf_folders, decoder, tmp_path):
    save_tokenizer(decoder, [f"<extra{index}>" for index in range(7)] + list(TOKENS))
    assemble_checkpoint(hf_folders[0] / "vit", decoder, BASE, tmp_path / "made")
    grown = MicroVLM.from_pretrained(tmp_path / "made")
    old = load_file(decoder / "model.safetensors")["model.embed_tokens.weight"]
    assert grown.config.text.vocab_size == 91
    assert torch.equal(grown.embedding.weight[:90], old)
    torch.testing.assert_close(grown.embedding.weight[90], old.mean(0))


def test_weights_keep_their_precision_and_new_parts_are_float32(hf_folders, decoder, tmp_path):
    root, _ = hf_folders
    weights = load_file(decoder / "model.safetensors")
    altered(decoder, tmp_path / "half", weights, {name: value.bfloat16() for name, value in weights.items()})
    save_tokenizer(tmp_path / "half")
    assemble_checkpoint(root / "vit", tmp_path / "half", BASE, tmp_path / "made")
    stored = load_file(tmp_path / "made" / "model.safetensors")
    kinds = {name.partition(".")[0]: value.dtype for name, value in stored.items()}
    assert (kinds["decoder"], kinds["embedding"], kinds["vision"]) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    assert {kinds[name] for name in ("adapter", "memory_encoder", "scope", "memory_prior")} == {torch.float32}
    name = "decoder.layers.0.mlp.up_proj.weight"
    assert torch.equal(stored[name], weights["model.layers.0.mlp.up_proj.weight"].bfloat16())
    loaded = MicroVLM.from_pretrained(tmp_path / "made").state_dict()
    assert loaded[name].dtype == torch.float32
    assert torch.equal(loaded[name], stored[name].float())


def test_a_seed_draws_the_same_new_parts_and_leaves_the_generator_alone(hf_folders):
    root, _ = hf_folders
    torch.manual_seed(0)
    before = torch.get_rng_state()
    models = [assemble(root / "vit", root / "qwen2", BASE, seed=seed).state_dict() for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    differing = {
        name.partition(".")[0] for name in models[0] if not torch.equal(models[0][name], models[2][name])
    }
    assert differing == {"adapter", "memory_encoder", "memory_projection", "scope"}


def test_a_tokenizer_that_does_not_fit_leaves_nothing(hf_folders, decoder, tmp_path):
    root, _ = hf_folders
    save_tokenizer(decoder, ["<|im_start|>"])
    assert "no token that ends a text" in refusal(root, decoder, tmp_path / "made")
    (decoder / "tokenizer.json").write_text("{")
    assert "tokenizer.json is not valid JSON" in refusal(root, decoder, tmp_path / "made")
    (decoder / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(root, decoder, tmp_path / "made")
