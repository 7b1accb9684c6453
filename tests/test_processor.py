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
from microvlm.inputs.processor_files import Preprocessor


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


def with_document(processor, name, **keys):
    """A processor whose file `name` has `keys` changed, and further keys that Hugging Face writes."""
    document = {**processor._files.raw[name], **keys, "transformers_version": "5.0", "device": {"a": [None]}}
    return Processor(processor.tokenizer, processor.config, {name: document})


LEVELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("keys", "scale", "mean", "std"),
    [
        ({}, 1 / 255, 0.5, 0.5),
        ({"rescale_factor": 1 / 127.5}, 1 / 127.5, 0.5, 0.5),
        ({"do_rescale": False, "rescale_factor": 7.0}, 1.0, 0.5, 0.5),
        ({"do_normalize": False, "image_mean": [1, 2, 3]}, 1 / 255, 0.0, 1.0),
        ({"do_rescale": False, "do_normalize": False}, 1.0, 0.0, 1.0),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}, 1 / 255, (0.1, 0.2, 0.3), (1, 2, 3)),
        ({"image_mean": 0.25, "image_std": 2}, 1 / 255, 0.25, 2),
        ({"do_center_crop": True, "crop_size": 32, "size": [32, 32]}, 1 / 255, 0.5, 0.5),
        ({"do_center_crop": False, "crop_size": 7, "size": {"shortest_edge": 32}}, 1 / 255, 0.5, 0.5),
        ({"image_processor_type": "DeiTImageProcessorFast", "do_convert_rgb": True}, 1 / 255, 0.5, 0.5),
        (dict.fromkeys(Preprocessor.__struct_fields__), 1 / 255, 0.5, 0.5),
    ],
    ids=str,
)
def test_a_preprocessors_numbers_are_computed(keys, scale, mean, std, tiny_processor):
    pixels = with_document(tiny_processor, "preprocessor_config.json", **keys).pixels(LEVELS)
    expected = (LEVELS * scale - np.broadcast_to(mean, 3)) / np.broadcast_to(std, 3)  # in float64
    assert pixels.dtype == np.float32
    assert np.abs(pixels - expected.transpose(2, 0, 1)).max() <= 2e-6 * max(1, np.abs(expected).max())


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
        {"do_rescale": False, "image_mean": [123.0, 116.5, 103.25], "image_std": [58.0, 57.0, 57.5]},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
    ],
    ids=str,
)
def test_rescaling_and_normalising_equal_a_vit_processors(keys, tiny_processor):
    """Exactly without rescaling; else to the last bits, because the product is rounded elsewhere."""
    vit = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
    options = {**tiny_processor._files.raw["preprocessor_config.json"], **keys}
    theirs = np.asarray(vit.ViTImageProcessorPil(**options)(Image.fromarray(LEVELS))["pixel_values"][0])
    ours = with_document(tiny_processor, "preprocessor_config.json", **keys).pixels(LEVELS)
    assert theirs.shape == ours.shape
    if options["do_rescale"] is False:
        assert np.array_equal(ours, theirs)
    assert np.abs(ours - theirs).max() <= 3e-7


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"resample": 2}, "'resample' is 2, which is not computed here; set it to 3"),
        ({"do_resize": False}, "'do_resize' is false"),
        ({"do_convert_rgb": False}, "'do_convert_rgb' is false"),
        ({"image_processor_type": "Pix2StructImageProcessor"}, "'image_processor_type' is 'Pix2Struct"),
        ({"feature_extractor_type": "EfficientNetFeatureExtractor"}, "'feature_extractor_type' is 'Eff"),
        ({"size": 64}, "'size' is '64', which does not fit config.json"),
        ({"size": {"height": 32, "width": 64}}, "'size' is .* which does not fit config.json"),
        ({"size": {}}, "'size' is .* which does not fit config.json"),
        ({"do_center_crop": True, "crop_size": 24}, "'crop_size' is '24', which does not fit config.json"),
        ({"image_std": [0.5, 0, 0.5]}, "pixels are not numbers"),
        ({"image_std": 1e-300}, "pixels are not numbers"),
        ({"image_mean": 1e300}, "pixels are not numbers"),
        ({"rescale_factor": 1e300}, "pixels are not numbers"),
        ({"rescale_factor": 0}, "'rescale_factor' must be"),
        ({"rescale_factor": float("nan")}, "number that is not finite"),
        ({"image_mean": [0.5, 0.5]}, "'image_mean' must be"),
        ({"image_mean": [0.5, "a" * 5000, 0.5]}, "'image_mean"),
        ({"do_rescale": "yes"}, "'do_rescale' must be true or false or null, not text"),
        ({"resample": True}, "'resample' must be"),
        ({"size": 10**30}, "'size' must be"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_a_preprocessor_asks_for_and_is_not_computed_is_refused(keys, sentence, tiny_processor):
    with pytest.raises(UserError, match=sentence) as error:
        with_document(tiny_processor, "preprocessor_config.json", **keys)
    assert str(error.value).startswith("preprocessor_config.json")
    assert len(str(error.value)) < 400


def test_nulls_of_a_generation_config_are_its_defaults(tiny_processor):
    name = "generation_config.json"
    processor = with_document(tiny_processor, name, eos_token_id=None, max_new_tokens=None, pad_token_id=None)
    assert processor.stop_tokens == (processor.eos_id,)
    assert processor.max_new_tokens == 32


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"eos_token_id": 300}, "'eos_token_id' has 300, and the model has 300 tokens"),
        ({"eos_token_id": [1, 2**31]}, "'eos_token_id"),
        ({"eos_token_id": -1}, "'eos_token_id"),
        ({"eos_token_id": "1"}, "'eos_token_id' must be"),
        ({"max_new_tokens": 0}, "'max_new_tokens' must be"),
        ({"max_new_tokens": 256}, "'max_new_tokens' is 256, and the model has 256 positions"),
        ({"max_new_tokens": 1.5}, "'max_new_tokens' must be"),
    ],
    ids=str,
)
def test_a_generation_config_of_another_model_is_refused(keys, sentence, tiny_processor):
    with pytest.raises(UserError, match=sentence):
        with_document(tiny_processor, "generation_config.json", **keys)


@pytest.mark.parametrize(
    "name", ["preprocessor_config.json", "generation_config.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"\xff{", b'{"a":' * 100_000, b'{"size": NaN}', b'{"a": 1' + b"0" * 5000]
)
def test_a_damaged_document_is_one_sentence_with_its_path(name, content, tiny_processor, tmp_path):
    tiny_processor.save(tmp_path)
    tiny_processor.config.save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        Processor.from_pretrained(tmp_path)
    assert str(error.value).startswith(str(tmp_path / name))
    assert "\n" not in str(error.value)


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
        (break_tokenizer, "tokenizer.json: 'model' is missing"),
        (break_preprocessor, "preprocessor_config.json: the document must be an object"),
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
    prompt = PromptConfig(template="<picture>{prompt}", image_token="<picture>")
    with pytest.raises(UserError, match="lacks '<picture>'"):
        Processor(tiny_processor.tokenizer, tiny_config(prompt=prompt))


def test_more_images_than_positions_are_refused_before_anything_is_built(tiny_processor):
    config = tiny_processor.config
    most = (config.text.max_position_embeddings - 1) // config.prefix_tokens
    assert tiny_processor.prompt_ids("a", most).count(tiny_processor.image_id) == most * config.prefix_tokens
    with pytest.raises(UserError, match=r"images are .* tokens, more than the 255 of this model: give fewer"):
        tiny_processor.prompt_ids("a", 10**9)
