"""A checkpoint assembled from Hugging Face directories: the decoder's tokenizer, its vocabulary and the prompt."""

import dataclasses

import pytest
import torch
from hf_models import BASE, altered
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from microvlm.errors import UserError
from microvlm.model.microvlm import MicroVLM
from microvlm.model.pretrained.hf_loading import assemble_checkpoint
from microvlm.presets import SMOLLM_PROMPT


def save_tokenizer(folder, tokens=("<|im_start|>", "<|im_end|>", "<|endoftext|>")) -> None:
    words = {word: index for index, word in enumerate(["[unk]", "user", "assistant", "what", "is", "this"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[unk]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(tokens))
    tokenizer.save(str(folder / "tokenizer.json"))


def test_an_assembled_checkpoint_answers_with_the_decoders_tokenizer(hf_folders, tmp_path):
    root, _ = hf_folders
    decoder = altered(root / "llama", tmp_path / "decoder")
    save_tokenizer(decoder)
    base = dataclasses.replace(BASE, prompt=SMOLLM_PROMPT)
    model_in_memory = assemble_checkpoint(root / "vit", decoder, base, tmp_path / "made")
    assert model_in_memory.config.text.vocab_size == 90
    loaded_model = MicroVLM.from_pretrained(tmp_path / "made")
    picture = Image.new("RGB", (30, 20), "red")
    answers = [
        model.generate([picture], ["what is this"], max_new_tokens=3)
        for model in (model_in_memory, loaded_model)
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 1
    with pytest.raises(UserError, match="not a MicroVLM"):
        assemble_checkpoint(root / "vit", decoder, base, decoder)


def test_a_vocabulary_that_is_full_grows_by_the_image_token(hf_folders, tmp_path):
    root, _ = hf_folders
    decoder = altered(root / "llama", tmp_path / "decoder")
    save_tokenizer(
        decoder, [f"<extra{index}>" for index in range(81)] + ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    )
    grown = assemble_checkpoint(
        root / "vit", decoder, dataclasses.replace(BASE, prompt=SMOLLM_PROMPT), tmp_path / "made"
    )
    old = load_file(decoder / "model.safetensors")["model.embed_tokens.weight"]
    assert grown.config.text.vocab_size == 91
    assert torch.equal(grown.embedding.weight[:90], old)
    torch.testing.assert_close(grown.embedding.weight[90], old.mean(0))
    assert torch.equal(MicroVLM.from_pretrained(tmp_path / "made").embedding.weight, grown.embedding.weight)


def test_a_tokenizer_that_does_not_fit_the_prompt_leaves_nothing(hf_folders, tmp_path):
    root, _ = hf_folders
    decoder = altered(root / "llama", tmp_path / "decoder")
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        assemble_checkpoint(root / "vit", decoder, BASE, tmp_path / "made")
    save_tokenizer(decoder, ["<|im_start|>"])
    with pytest.raises(UserError, match="lacks"):
        assemble_checkpoint(root / "vit", decoder, BASE, tmp_path / "made")
    (decoder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        assemble_checkpoint(root / "vit", decoder, BASE, tmp_path / "made")
    assert not (tmp_path / "made").exists()
