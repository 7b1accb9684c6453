"""A decoder behind the convolutional encoder of another MicroVLM: assembled, trained in two stages, exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from captioned_pictures import draw, write_data
from conftest import TERNARY, seeded_model, tiny_config
from hf_models import BASE, altered
from safetensors.torch import load_file
from test_convolutional_encoder import float_state, pictures, vision
from test_hf_checkpoint import save_tokenizer

from microvlm import load
from microvlm.commands.assemble import base_config
from microvlm.errors import UserError
from microvlm.exporters.bundle_writer import export
from microvlm.formats.weight_format import WeightFormat
from microvlm.inputs.processor import Processor
from microvlm.model.checkpoint import load_checkpoint, resolve_checkpoint, save_checkpoint
from microvlm.model.lowering import lower
from microvlm.model.pretrained.assembly import assemble_checkpoint
from microvlm.model.pretrained.efficientnet_weights import integer_tensors
from microvlm.model.pretrained.float_weights import float_weights
from microvlm.model.pretrained.parts import find_part
from microvlm.model.pretrained.spelled_names import NAMES, read_names, spell_names
from microvlm.training.caption_options import NEW_PARTS, CaptionOptions, TeacherOptions
from microvlm.training.recipe import Recipe, StageConfig
from microvlm.training.stages.task import DataFolder
from microvlm.training.trainer import open_data, train

SPELLED = ("a red heart", "image", "", "this is a red heart")
"""Names of the first classes: one that fits, one with room for its end, none, and one that is cut."""
PIECES = 6
LARGE_BIAS = 2**24 + 1
"""A whole number that no float32 is."""
FROZEN_NAMES = dict.fromkeys(NEW_PARTS, 1.0) | {"adapter.names": 0.0}


@pytest.fixture(scope="module")
def seeing(tiny_processor, tmp_path_factory) -> Path:
    """A ternary checkpoint with a convolutional encoder that has names, as `photo` is."""
    sizes = vision(name_pieces=PIECES, resize="stretch")
    config = tiny_config(TERNARY, vision=sizes, prefix_tokens=0)
    model = seeded_model(config)
    processor = Processor(tiny_processor.tokenizer, config)
    model.vision.load_state_dict(integer_tensors(float_state(sizes), sizes, [pictures(4, 128)], "made here"))
    model.vision.head.bias[0] = LARGE_BIAS
    with torch.no_grad():
        table = spell_names(SPELLED, PIECES, processor, model.embedding.weight)
        model.adapter.names.weight.zero_()[:, : len(SPELLED)] = table
    folder = tmp_path_factory.mktemp("seeing") / "seeing"
    save_checkpoint(lower(model, WeightFormat(1.58, "2bit", 8)), folder)
    processor.save(folder)
    return folder


@pytest.fixture(scope="module")
def assembled(seeing, hf_folders, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("assembled")
    decoder = altered(hf_folders[0] / "qwen2", root / "decoder")
    save_tokenizer(decoder)
    assemble_checkpoint(seeing, decoder, BASE, root / "start", template="{prompt}:", seed=2)
    return root / "start"


def stages(
    *trained: dict[str, float], decoder_bits: float = 32, teacher: TeacherOptions | None = None
) -> Recipe:
    return Recipe(
        "tried",
        None,
        0,
        tuple(
            StageConfig(
                f"stage{number}", "captions", 2, 8, 1e-3, decoder_bits=decoder_bits,
                caption=CaptionOptions(trained=parts, teacher=teacher),
            )
            for number, parts in enumerate(trained, 1)
        ),
        save_every=1,
        log_every=1,
    )  # fmt: skip


def test_names_are_read_back_from_the_embeddings_that_spell_them(seeing):
    names = read_names(seeing)
    assert names[:2] == ["a red heart", "image"]
    assert names[2] == ""
    assert "this is a red heart".startswith(names[3])
    assert names[4:] == [""] * 6


def test_the_names_of_the_bundled_photo_are_read_back():
    names = read_names(resolve_checkpoint("photo"))
    assert {"abacus", "accordion", "koala", "pizza"} <= set(names)
    assert len({name for name in names if name}) > 1500


def test_a_number_of_prefix_embeddings_is_refused_for_a_convolutional_encoder(seeing, hf_folders):
    parts = find_part(seeing, "vision"), find_part(hf_folders[0] / "qwen2", "decoder")
    with pytest.raises(UserError, match="--prefix-tokens is for encoders of patches"):
        base_config(*parts, prefix_tokens=9)
    assert base_config(*parts).prefix_tokens == parts[0].vision_config().num_tokens + PIECES


def test_the_encoder_is_the_same_bytes_and_names_are_in_the_decoders_tokens(seeing, assembled):
    model, origin = load_checkpoint(assembled), load_checkpoint(seeing)
    assert model.config.vision == origin.config.vision
    assert model.config.prefix_tokens == 5 + PIECES
    before, after = origin.vision.state_dict(), model.vision.state_dict()
    whole = [name for name, tensor in before.items() if not tensor.is_floating_point()]
    assert len(whole) > 10
    assert all(torch.equal(before[n], after[n]) for n in whole if "classifier" not in n)
    assert int(after["head.bias"][0]) == LARGE_BIAS
    pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen, expected = model.vision(pixels), origin.vision(pixels)
        features = model.config.vision.features_of_token
        assert torch.equal(seen[..., :features], expected[..., :features])
        # The classifiers are float now: their weights have the values of eight bits, what they read is not rounded.
        torch.testing.assert_close(seen[..., features:], expected[..., features:], rtol=0, atol=0.1)
        weights = torch.zeros(10)
        weights[1] = 1.0
        spelled = model.adapter.names(weights).view(PIECES, -1)
        processor = Processor.from_pretrained(assembled)
        ids = [*processor.text_ids("image", after_blank=True), processor.eos_id][:PIECES]
        torch.testing.assert_close(spelled[: len(ids)], model.embedding.weight[ids].float())


def test_whole_numbers_are_read_as_whole_numbers(seeing):
    weights = float_weights(seeing)
    assert weights["vision.head.weight"].dtype == torch.uint8
    assert int(weights["vision.head.bias"][0]) == LARGE_BIAS
    assert weights["vision.classifier.weight"].dtype == torch.float32


@pytest.mark.training
def test_two_stages_train_it_and_its_export_says_the_same(assembled, tmp_path):
    data = write_data(tmp_path / "pictures")
    recipe = stages(FROZEN_NAMES, FROZEN_NAMES | {"decoder.layers.last1": 0.1})
    run = tmp_path / "run"
    opened = open_data(recipe, [DataFolder(data)])
    # Stopped in its first stage and resumed.
    assert not train(recipe, opened, run, lambda line: None, start=str(assembled), stop_after=1)
    assert train(recipe, opened, run, lambda line: None, start=str(assembled))
    before, after = (load_file(folder / "model.safetensors") for folder in (assembled, run / "checkpoint"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {*NEW_PARTS, "decoder"}
    assert {name for name in changed if name.startswith("decoder")} <= {
        name for name in before if name.startswith("decoder.layers.1.")
    }
    assert NAMES not in changed
    assert {"adapter.whole.weight", "adapter.classes.weight", "adapter.places"} <= changed
    # It raises CheckFailed if a graph differs from torch.
    export(run / "checkpoint", tmp_path / "bundle", WeightFormat(8), threads=1)
    picture = np.asarray(draw("red", "disc", 3, 96))
    said = load(tmp_path / "bundle", backend="ort").generate([picture], max_new_tokens=4)
    assert said == load(tmp_path / "bundle", backend="torch").generate([picture], max_new_tokens=4)


@pytest.mark.training
def test_a_teacher_distils_it_into_a_ternary_one(assembled, tmp_path):
    recipe = stages(FROZEN_NAMES | {"decoder": 1.0}, decoder_bits=1.58, teacher=TeacherOptions())
    data = write_data(tmp_path / "pictures")
    assert train(
        recipe,
        open_data(recipe, [DataFolder(data)]),
        tmp_path / "run",
        lambda line: None,
        start=str(assembled),
    )
    model = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert model.config.quantization.is_ternary
    assert int(model.vision.head.bias[0]) == LARGE_BIAS
