"""Prompts become token rows, pictures become pixel values, and ids become text again."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

from microvlm.config import PromptConfig
from microvlm.errors import UserError
from microvlm.inputs.processor import Processor, pad_left


def test_each_image_becomes_its_prefix_tokens_at_the_place_of_the_image_token(tiny_processor):
    image, k = tiny_processor.image_id, tiny_processor.config.prefix_tokens
    assistant = tiny_processor.tokenizer.token_to_id("<|assistant|>")
    question = tiny_processor.text_ids("what is this?")
    assert tiny_processor.prompt_ids("what is this?", 0) == [*question, assistant]
    assert tiny_processor.prompt_ids("what is this?", 2) == [image] * (2 * k) + [*question, assistant]


def test_a_batch_is_padded_on_the_left(tiny_processor):
    white = Image.new("RGB", (32, 32), "white")
    inputs = tiny_processor(["what is this?", "a"], [[white], []])
    assert inputs.input_ids.dtype == inputs.attention_mask.dtype == np.int64
    lengths = inputs.attention_mask.sum(1)
    assert lengths[0] > lengths[1]
    for row, mask, length in zip(inputs.input_ids, inputs.attention_mask, lengths, strict=True):
        assert (mask[-length:] == 1).all()
        assert (row[:-length] == tiny_processor.pad_id).all()
    assert inputs.pixel_values.shape == (1, 3, 32, 32)


def test_pad_left_takes_an_empty_row():
    ids, mask = pad_left([[5, 6], []], 9)
    assert ids.tolist() == [[5, 6], [9, 9]]
    assert mask.tolist() == [[1, 1], [0, 0]]


def test_pixels_are_normalised_by_channel(tiny_processor):
    pixels = tiny_processor.pixels(np.full((32, 32, 3), (0, 51, 255), np.uint8))
    assert pixels.dtype == np.float32
    assert np.allclose(pixels[:, 7, 7], [-1.0, -0.6, 1.0], atol=1e-6)


def test_preprocessing_equals_the_training_normalisation(tiny_processor):
    torch = pytest.importorskip("torch")
    from microvlm.model.vision import normalise

    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    trained = normalise(torch.from_numpy(image).permute(2, 0, 1)[None] / 255, tiny_processor.config.vision)
    assert np.abs(tiny_processor.pixels(image) - trained[0].numpy()).max() < 1e-6


@pytest.mark.parametrize("token", ["<image>", "<|end|>", "<|assistant|>"])
def test_a_prompt_may_not_hold_a_sign_of_the_model(tiny_processor, token):
    with pytest.raises(UserError, match="leave"):
        tiny_processor.prompt_ids(f"ignore that {token} please", 1)


@pytest.fixture(scope="module")
def folding(tiny_processor):
    config = dataclasses.replace(tiny_processor.config, prompt=PromptConfig(fold_text=True))
    return Processor(tiny_processor.tokenizer, config)


def test_a_model_that_knows_lower_case_alone_is_asked_in_it(folding, tiny_processor):
    for text in ("Describe the image.", "  describe   the\timage ", "DESCRIBE THE IMAGE ..."):
        assert folding.prompt_ids(text, 1) == tiny_processor.prompt_ids("describe the image", 1)
        assert folding.text_ids(text) == tiny_processor.text_ids("describe the image")
        assert tiny_processor.prompt_ids(text, 1) != tiny_processor.prompt_ids("describe the image", 1)
    assert folding.normalize_text("what is this?") == "what is this?"
    assert folding.normalize_text("3.5 e.g. 2.") == "3.5 e.g. 2"
    assert folding.normalize_text("...") == "..."


def test_folding_makes_no_sign_of_the_model(folding, tiny_processor):
    tiny_processor.reject_special_tokens("<IMAGE> is text")
    with pytest.raises(UserError, match="leave '<image>' out"):
        folding.prompt_ids("<IMAGE> is no text", 0)


def test_braces_in_a_prompt_are_text(tiny_processor):
    ids = tiny_processor.prompt_ids("what is {prompt} in {0}?", 0)
    assert tiny_processor.decode(ids) == "what is {prompt} in {0}?"


def test_streamed_pieces_join_to_the_decoded_text_and_never_split_a_character(tiny_processor):
    ids = tiny_processor.text_ids("naïve 猫 🙂 end")
    stream = tiny_processor.stream()
    pieces = [stream.feed(token) for token in ids]
    assert "".join(pieces) == tiny_processor.decode(ids) == "naïve 猫 🙂 end"
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces


def test_a_saved_processor_loads_the_same(tiny_processor, tmp_path):
    tiny_processor.save(tmp_path)
    tiny_processor.config.save(tmp_path)
    loaded = Processor.from_pretrained(tmp_path)
    image = Image.new("RGB", (50, 20), "red")
    before, after = tiny_processor(["a red heart"], [[image]]), loaded(["a red heart"], [[image]])
    for array, loaded_array in zip(before, after, strict=True):
        assert np.array_equal(array, loaded_array)
    assert loaded.stop_tokens == tiny_processor.stop_tokens


def test_stop_tokens_hold_the_generation_config_and_the_end_token(tiny_processor):
    config = tiny_processor.config
    documents = {"generation_config.json": {"eos_token_id": [7, 8], "max_new_tokens": 5}}
    processor = Processor(tiny_processor.tokenizer, config, documents)
    assert processor.stop_tokens == (7, 8, processor.eos_id)
    assert processor.max_new_tokens == 5


def break_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def break_preprocessor(folder):
    (folder / "preprocessor_config.json").write_text("[")


def resize_preprocessor(folder):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": {"height": 64, "width": 64}}))


def drop_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def drop_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (break_tokenizer, "tokenizer.json is damaged"),
        (break_preprocessor, "preprocessor_config.json is damaged"),
        (resize_preprocessor, "does not fit config.json"),
        (drop_tokenizer, "tokenizer.json is missing"),
        (drop_config, "config.json is missing"),
    ],
)
def test_a_damaged_processor_file_is_named(damage, sentence, tiny_processor, tmp_path):
    tiny_processor.save(tmp_path)
    tiny_processor.config.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=sentence):
        Processor.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tiny_processor):
    with pytest.raises(UserError, match="lacks '<picture>'"):
        Processor(tiny_processor.tokenizer, tiny_config(prompt=PromptConfig(image_token="<picture>")))
