"""Stage `captions`: what learns, what stays bit-equal, what its losses see, and runs that are stopped and resumed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from captioned_pictures import mixed_data, write_data
from conftest import FLOAT, seeded_model, tiny_config
from safetensors.torch import load_file, save_file

from microvlm import MicroVLM
from microvlm.bench.report import report_of_file
from microvlm.config import MicroVLMConfig, QuantizationConfig
from microvlm.errors import UserError
from microvlm.formats.weight_format import WeightFormat
from microvlm.inputs.processor import Processor
from microvlm.model.checkpoint import HEADS
from microvlm.model.lowering import lower
from microvlm.model.pretrained.assembly import assembled_weights
from microvlm.model.pretrained.parts import find_part
from microvlm.training.budget import Budget, parse_budget, resolve_steps
from microvlm.training.caption_options import CaptionOptions, TeacherOptions
from microvlm.training.frozen_base import check_base_bits
from microvlm.training.loop.loss_guard import STOPPED_BATCH, LossGuard
from microvlm.training.loop.run_state import state_folders
from microvlm.training.loop.stage_trainer import step_generator
from microvlm.training.losses.alignment_loss import chance_loss, chance_recall
from microvlm.training.losses.distillation_loss import relation_divergence
from microvlm.training.recipe import Recipe, StageConfig, load_recipe, packaged_recipes
from microvlm.training.stages.captions import CaptionTask
from microvlm.training.stages.task import DataFolder
from microvlm.training.trainer import TrainingRun, open_data, train
from microvlm.training.watching import names

NEW = {"adapter": 1.0, "memory_encoder": 1.0, "memory_projection": 1.0, "memory_prior": 1.0, "scope": 1.0}
FIRST = StageConfig("stage1", "captions", 3, 8, 1e-3, caption=CaptionOptions(trained=NEW))
SECOND = StageConfig(
    "stage2", "captions", 3, 8, 1e-3, caption=CaptionOptions(trained=NEW | {"decoder.layers.last1": 0.1})
)
STAGES = Recipe("stages", None, 0, (FIRST, SECOND), mixed_precision="no", log_every=1, save_every=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_processor) -> Path:
    """A float checkpoint without SubLN and with a tokenizer, as an assembled model is."""
    config = tiny_config(FLOAT)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, sub_norm=False))
    folder = tmp_path_factory.mktemp("start") / "start"
    seeded_model(config).save_pretrained(folder)
    Processor(tiny_processor.tokenizer, config).save(folder)
    return folder


def opened(data: Path, recipe: Recipe = STAGES):
    return open_data(recipe, [DataFolder(data)])


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def finished(data, start, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    assert train(STAGES, opened(data), out, silent, start=str(start))
    return out


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def test_frozen_parts_stay_bit_equal_and_every_chosen_part_learns(finished, start):
    before, after = weights(start), weights(finished / "checkpoint")
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {*NEW, "decoder"}
    assert {name for name in changed if name.startswith("decoder.")} == {
        name for name in before if name.startswith("decoder.layers.1.")
    }
    assert (finished / "checkpoint" / HEADS).is_file()
    stored = load_file(finished / "stage1" / "weights.safetensors")
    assert {name.split(".")[0] for name in stored} == set(NEW)


def test_a_run_leaves_metrics_evaluations_pictures_samples_and_a_model_that_speaks(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert {
        "train/lm_loss",
        "train/alignment_loss",
        "train/alignment_chance",
        "train/memory_kl",
        "train/addressing_kl",
        "train/episode_loss",
        "train/learning_rate",
        "train/global_step",
    } <= set(logged[0])
    seen = set().union(*rows)
    assert {"attention/mean", "attention/max", "attention/entropy", "attention/sparsity"} <= seen
    assert {"memory/utilization", "model/trainable_params", "model/total_params"} <= seen
    evaluations = [json.loads(line) for line in (finished / "evaluations.jsonl").read_text().splitlines()]
    assert (evaluations[0]["stage"], evaluations[0]["stage_step"]) == ("stage1", 0)
    assert (evaluations[-1]["stage"], evaluations[-1]["stage_step"]) == ("stage2", 3)
    assert {"evaluation/loss", "evaluation/episode_loss_on", "attention/divergence"} <= set(evaluations[-1])
    last = evaluations[-1]
    assert evaluations[0]["attention/divergence"] == 0
    assert last["attention/divergence"] > 0
    # Five held-out pictures are too few for a p-value below .05.
    assert "attention/drift_p" not in last
    for name in ("lejepa/image_features", "lejepa/text_features", "lejepa/memory_latents"):
        assert last[name] > 0
        assert 0 < last[f"{name}_p"] <= 1
    logged_names = {name for row in (*rows, *evaluations) for name in row}
    statistics = {
        name for name in logged_names if name.startswith(("attention/", "lejepa/", "evaluation/attention"))
    }
    assert len(statistics) == 15
    assert statistics <= set(names.MEANINGS)
    assert list((finished / "pictures").glob("attention-*.png"))
    assert list((finished / "pictures").glob("addressing-*.png"))
    assert (finished / "curves.png").is_file()
    samples = json.loads(max((finished / "samples").glob("*.json")).read_text())
    assert samples
    assert all((finished / "samples" / row["picture"]).is_file() for row in samples)
    assert json.loads((finished / "status.json").read_text())["state"] == "finished"
    report = report_of_file(finished / "summary.json")
    assert [table.name for table in report.tables] == [
        "stages",
        "evaluations",
        "curve-stage1",
        "curve-stage2",
        "devices",
    ]
    assert "stage2" in report.text()
    model = MicroVLM.from_pretrained(finished / "checkpoint")
    assert isinstance(model.generate(np.zeros((40, 40, 3), np.uint8)), str)


def test_the_text_decoder_alone_is_unchanged_while_it_is_frozen(data, start, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("what is this? a red heart. describe the image. " * 40)
    recipe = msgspec.structs.replace(STAGES, stages=(FIRST,))
    assert train(recipe, opened(data), tmp_path / "run", silent, start=str(start), text=text)
    rows = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    values = {row["evaluation/text_perplexity"] for row in rows}
    assert len(rows) > 1
    assert len(values) == 1


def test_a_run_that_is_stopped_after_every_step_ends_with_the_weights_of_an_unbroken_one(
    finished, data, start, tmp_path
):
    out, calls = tmp_path / "run", 0
    while not train(STAGES, opened(data), out, silent, start=str(start), stop_after=1):
        calls += 1
    assert calls == 4
    unbroken = weights(finished / "checkpoint")
    assert all(torch.equal(value, unbroken[name]) for name, value in weights(out / "checkpoint").items())

    def losses(run):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]

    assert losses(out) == losses(finished)
    assert [path.name for path in state_folders(out / "stage1")] == ["00000002", "00000003"]


KILLS = int(os.environ.get("MICROVLM_TEST_KILLS", "2"))
"""Twenty take a quarter of an hour."""
KILLED = """
import sys
from pathlib import Path
import msgspec
from microvlm.training.recipe import Recipe
from microvlm.training.stages.task import DataFolder
from microvlm.training.trainer import open_data, train
recipe = msgspec.json.decode(sys.argv[1], type=Recipe)
train(recipe, open_data(recipe, [DataFolder(Path(sys.argv[2]))]), Path(sys.argv[4]), print, start=sys.argv[3])
"""


@pytest.mark.posix
@pytest.mark.training
def test_kills_at_random_moments_lose_no_more_than_the_steps_since_the_last_state(data, start, tmp_path):
    """All runs are processes of their own: another number of threads would add in another order."""
    out, rng = tmp_path / "run", np.random.default_rng(0)
    arguments = [msgspec.json.encode(STAGES).decode(), str(data), str(start), str(out)]
    whole = [*arguments[:3], str(tmp_path / "whole")]
    subprocess.run([sys.executable, "-P", "-c", KILLED, *whole], stdout=subprocess.DEVNULL, check=True)
    kills = 0
    while not (out / "checkpoint" / "model.safetensors").is_file():
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", KILLED, *arguments], stdout=subprocess.DEVNULL, env=os.environ
        )
        if kills < KILLS:
            wait = time.monotonic() + 120
            while not any(out.glob("stage*/states/*")) and time.monotonic() < wait and process.poll() is None:
                time.sleep(0.02)
            time.sleep(float(rng.random()) * 1.5)
            process.send_signal(signal.SIGKILL)
            kills += 1
            process.wait()
        else:
            assert process.wait() == 0
    unbroken = weights(tmp_path / "whole" / "checkpoint")
    assert all(torch.equal(value, unbroken[name]) for name, value in weights(out / "checkpoint").items())


@pytest.mark.posix
def test_an_interrupt_ends_the_step_and_saves_it(data, start, tmp_path, monkeypatch):
    out, lines = tmp_path / "run", []
    loss = CaptionTask.loss

    def interrupted(task, module, batch):
        os.kill(os.getpid(), signal.SIGINT)
        return loss(task, module, batch)

    monkeypatch.setattr(CaptionTask, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(STAGES, opened(data), out, lines.append, start=str(start))
    assert [path.name for path in state_folders(out / "stage1")] == ["00000001"]
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    assert any("stopped after step 1 of stage1, which is saved" in line for line in lines)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_batch(data, start, tmp_path, monkeypatch):
    loss = CaptionTask.loss

    def spoiled(task, module, batch):
        value, metrics = loss(task, module, batch)
        return value * float("nan"), metrics

    monkeypatch.setattr(CaptionTask, "loss", spoiled)
    out = tmp_path / "run"
    with pytest.raises(
        UserError, match=r"stage 'stage1' stopped at step 1: the loss is no number .* samples"
    ):
        train(STAGES, opened(data), out, silent, start=str(start))
    assert len(json.loads((out / STOPPED_BATCH).read_text())["samples"]) == 8
    assert state_folders(out / "stage1") == []
    assert json.loads((out / "status.json").read_text())["state"] == "failed"


def test_distillation_gives_a_ternary_model_with_sub_norms(data, start, tmp_path):
    stage = msgspec.structs.replace(
        SECOND,
        name="distill",
        decoder_bits=1.58,
        caption=CaptionOptions(trained=NEW | {"decoder": 1.0}, teacher=TeacherOptions(relation_heads=4)),
    )
    recipe = msgspec.structs.replace(STAGES, stages=(stage,))
    out = tmp_path / "run"
    assert train(recipe, opened(data), out, silent, start=str(start))
    after = weights(out / "checkpoint")
    assert "decoder.layers.0.mlp.down_proj.packed" in after
    assert "decoder.layers.0.self_attn.sub_norm.weight" in after
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "train/loss" in row)
    assert first["train/distillation_kl"] > 0
    assert first["train/relation_loss"] > 0
    config = json.loads((out / "checkpoint" / "config.json").read_text())
    assert config["quantization"] == {"decoder_bits": 1.58, "vision_bits": 8, "embedding_bits": 8}


@pytest.mark.parametrize("rotation", [0, 16])
def test_a_run_begins_with_another_checkpoints_decoder_and_keeps_its_teacher(data, start, tmp_path, rotation):
    """Its rotation too, which the recipe of the run need not name."""
    teacher = TeacherOptions(relation_heads=4)
    stage = msgspec.structs.replace(
        SECOND,
        decoder_bits=1.58,
        learning_rate=1e-9,
        caption=CaptionOptions(trained=NEW | {"decoder": 1.0}, teacher=teacher),
    )
    recipe = msgspec.structs.replace(STAGES, stages=(stage,))
    fast = msgspec.structs.replace(stage, learning_rate=1e-2, rotation=rotation)
    faster = msgspec.structs.replace(recipe, stages=(fast,))
    assert train(faster, opened(data), tmp_path / "texts", silent, start=str(start))
    ternary = tmp_path / "texts" / "checkpoint"
    began: list[str] = []
    assert train(
        recipe, opened(data), tmp_path / "run", began.append, start=str(start), decoder_from=str(ternary)
    )
    assert any(f"the decoder from {ternary}" in line for line in began)
    theirs, ours = weights(ternary), weights(tmp_path / "run" / "checkpoint")
    packed = [name for name in theirs if name.startswith("decoder.") and name.endswith(".packed")]
    norms = [name for name in theirs if name.startswith("decoder.") and "sub_norm" in name]
    assert packed
    assert norms
    assert all(torch.equal(theirs[name], ours[name]) for name in packed)
    assert all(torch.allclose(theirs[name], ours[name], atol=1e-6) for name in norms)
    text = MicroVLMConfig.load(tmp_path / "run" / "checkpoint").text
    assert (text.rotation, text.sub_norm) == (rotation, True)
    adapter = next(name for name in theirs if name.startswith("adapter.") and name.endswith(".weight"))
    assert not torch.equal(theirs[adapter], ours[adapter])
    recorded = json.loads((tmp_path / "run" / "recipe.json").read_text())["start"]
    assert recorded["decoder_sha256"] != recorded["weights_sha256"]
    # What the run does not train is stored as it came.
    frozen = msgspec.structs.replace(stage, caption=CaptionOptions(trained=NEW))
    assert train(
        msgspec.structs.replace(recipe, stages=(frozen,)), opened(data), tmp_path / "frozen", silent,
        start=str(start), decoder_from=str(ternary),
    )  # fmt: skip
    kept = weights(tmp_path / "frozen" / "checkpoint")
    assert all(torch.equal(theirs[name], kept[name]) for name in theirs if name.startswith("decoder."))
    other = msgspec.structs.replace(stage, rotation=64)
    refusal = f"has a rotation of {rotation}, and that of the recipe's first stage one of 64"
    with pytest.raises(UserError, match=refusal):
        train(
            msgspec.structs.replace(recipe, stages=(other,)), opened(data), tmp_path / "other", silent,
            start=str(start), decoder_from=str(ternary),
        )  # fmt: skip
    # Without --decoder-from the same folder is another run.
    with pytest.raises(UserError, match="with another start"):
        train(recipe, opened(data), tmp_path / "run", silent, start=str(start))


@pytest.mark.parametrize(
    ("decoder", "from_ternary", "fresh", "sentence"),
    [
        ("start", True, (), "give --start the float model"),
        ("nano", False, (), "another model's checkpoint: its decoder or its tokens"),
        ("start", False, ("decoder",), "exclude each other"),
        ("ternary", False, (), "is ternary, and that of the recipe's first stage is not"),
        ("turned", False, (), "another model's checkpoint: its decoder or its tokens"),
    ],
)
def test_a_decoder_that_cannot_take_the_starts_place_is_one_sentence(
    data, start, speaking_checkpoint, tmp_path, decoder, from_ternary, fresh, sentence
):
    """`turned` has the same shapes and other angles; `ternary` fits, and the recipe trains floats."""
    alone = msgspec.structs.replace(STAGES, stages=(SECOND,))
    changed = tmp_path / decoder
    if decoder in ("turned", "ternary"):
        shutil.copytree(start, changed)
        config = json.loads((changed / "config.json").read_text())
        config["text"] |= {"rope_theta": 777.0} if decoder == "turned" else {"sub_norm": True}
        (changed / "config.json").write_text(json.dumps(config))
    given = {"start": str(start), "nano": "nano"}.get(decoder, str(changed))
    with pytest.raises(UserError, match=sentence):
        train(
            alone,
            opened(data),
            tmp_path / "run",
            silent,
            start=str(speaking_checkpoint if from_ternary else start),
            fresh=fresh,
            decoder_from=given,
        )
    assert not (tmp_path / "run").exists()


def make_task(data, start, stage: StageConfig = FIRST) -> CaptionTask:
    recipe = msgspec.structs.replace(STAGES, stages=(stage,))
    run = TrainingRun(recipe, opened(data), Path("unused"), silent, start=str(start))
    task = run.task(0)
    assert isinstance(task, CaptionTask)
    return task


def test_a_batch_is_a_function_of_its_step_and_the_loss_draws_no_numbers(data, start):
    task = make_task(data, start)
    first, again = (task.draw_step(3, step_generator(0, 0, 3, 0)) for _ in range(2))
    assert torch.equal(first.pixels, again.pixels)
    assert first.keys == again.keys
    assert first.keys != task.draw_step(4, step_generator(0, 0, 4, 0)).keys
    state = torch.get_rng_state()
    one, _ = task.loss(task.module, first)
    two, _ = task.loss(task.module, again)
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_memory_reaches_the_answers_and_learns(data, start):
    """The seed computed the memory's keys and values and never gave them to the decoder."""
    task = make_task(data, start)
    batch = task.draw_step(0, step_generator(0, 0, 0, 0))
    assert batch.episodes is not None
    loss, metrics = task.loss(task.module, batch)
    loss.backward()
    for part in ("memory_encoder", "memory_projection", "scope", "adapter"):
        gradients = [p.grad for p in task.model.get_submodule(part).parameters() if p.grad is not None]
        assert any(gradient.abs().sum() > 0 for gradient in gradients), part
    assert task.model.memory_prior.grad.abs().sum() > 0
    assert all(p.grad is None for p in task.model.decoder.parameters())
    with torch.no_grad():
        task.model.memory_projection.linear.weight.mul_(-1)
    _, other = task.loss(task.module, batch)
    assert other["train/episode_loss"] != metrics["train/episode_loss"]


def test_alignment_begins_near_chance(data, start):
    task = make_task(data, start)
    _, metrics = task.loss(task.module, task.draw_step(0, step_generator(0, 0, 0, 0)))
    chance = metrics["train/alignment_chance"].item()
    assert chance <= math.log(8) + 1e-6
    assert abs(metrics["train/alignment_loss"].item() - chance) < 1.5


@pytest.mark.parametrize(
    ("trained", "sentence"),
    [
        ({"nose": 1.0}, "no parameter is called 'nose'; the model's parts are"),
        ({"decoder.layers.1-7": 1.0}, "names a layer beyond the last one, 1"),
        ({"adapter": 0.0}, "trains nothing"),
    ],
)
def test_a_stage_that_would_train_nothing_is_one_sentence(data, start, trained, sentence):
    stage = msgspec.structs.replace(FIRST, caption=CaptionOptions(trained=trained))
    with pytest.raises(UserError, match=sentence):
        make_task(data, start, stage)


def test_packaged_recipes_are_read():
    assert {"test", "test-start", "stage1", "stage2", "distill", "nano"} <= set(packaged_recipes())
    for name in packaged_recipes():
        assert load_recipe(name).stages


def test_a_recipe_for_an_existing_model_asks_for_one(data, tmp_path):
    with pytest.raises(UserError, match="give --start, a checkpoint that microvlm assemble"):
        train(STAGES, opened(data), tmp_path / "run", silent)
    assert not (tmp_path / "run").exists()


def test_a_frozen_decoder_at_four_bits_needs_bitsandbytes(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(UserError, match=r"--base-bits 4 .* needs bitsandbytes: pip install bitsandbytes"):
        check_base_bits(4)
    check_base_bits(32)


def test_a_frozen_decoder_at_four_bits_trains_the_new_parts_and_leaves_its_own_bytes(data, start, tmp_path):
    pytest.importorskip("bitsandbytes")
    recipe = msgspec.structs.replace(STAGES, stages=(FIRST,))
    out, lines = tmp_path / "run", []
    assert train(recipe, opened(data), out, lines.append, start=str(start), base_bits=4)
    assert "stage1: 12 frozen layers of the decoder are held at four bits" in lines
    before, after = weights(start), weights(out / "checkpoint")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(NEW)


def test_a_jump_of_the_loss_is_a_spike_and_its_noise_is_not(tmp_path):
    guard = LossGuard(tmp_path, "stage1")
    rng = np.random.default_rng(0)
    for step in range(200):
        guard.check(step, 2.0 + 0.2 * float(rng.standard_normal()), 1.0, ["a"])
    with pytest.raises(UserError, match=r"the loss jumped to 9 from a mean of (1\.9|2)"):
        guard.check(200, 9.0, 1.0, ["a", "b"])
    with pytest.raises(UserError, match="the gradient is no number"):
        guard.check(201, 2.0, float("inf"), [])


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("300", Budget(steps=300)),
        ("20 steps", Budget(steps=20)),
        ("90s", Budget(seconds=90)),
        ("8m", Budget(seconds=480)),
        ("1.5h", Budget(seconds=5400)),
    ],
)
def test_a_budget_is_steps_or_a_time(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "0", "-3", "1.5", "two", "5 days", "nan", "1e9h"])
def test_a_budget_of_another_kind_is_one_sentence(text):
    with pytest.raises(UserError, match=r"--budget is .*: give steps \(300\) or a time"):
        parse_budget(text)


def test_a_budget_is_divided_as_the_recipe_divides_its_steps():
    recipe = msgspec.structs.replace(
        STAGES, stages=(msgspec.structs.replace(FIRST, steps=0, epochs=2), SECOND), save_every_epochs=0.5
    )
    resolved = resolve_steps(recipe, 80, None, lambda _: 1.0)
    assert [stage.steps for stage in resolved.stages] == [20, 3]
    assert (resolved.save_every, resolved.save_every_epochs) == (5, 0)
    resolved = resolve_steps(recipe, 80, Budget(steps=46), lambda _: 1.0)
    assert [stage.steps for stage in resolved.stages] == [40, 6]
    resolved = resolve_steps(recipe, 80, Budget(seconds=100), lambda index: (2.0, 0.5)[index])
    assert [stage.steps for stage in resolved.stages] == [36, 22]
    with pytest.raises(UserError, match="is in epochs, which this data has not"):
        resolve_steps(recipe, None, None, lambda _: 1.0)


def test_the_vision_encoder_of_a_checkpoint_is_a_part(start, tmp_path, hf_folders):
    root, _ = hf_folders
    decoder = next(path for path in sorted(root.iterdir()) if "qwen2" in path.name or "llama" in path.name)
    part = find_part(start, "vision")
    assert part.vision_config() == tiny_config(FLOAT).vision
    weights_of = assembled_weights(part, find_part(decoder, "decoder"), tiny_config(FLOAT))
    own = {name: tensor for name, tensor in weights(start).items() if name.startswith("vision.")}
    assert own
    assert all(torch.equal(weights_of.tensors[name].read(), tensor) for name, tensor in own.items())


def test_alignment_heads_go_on_from_stage_to_stage_and_from_run_to_run(finished, data):
    """A second run that starts from a checkpoint has its heads, so that alignment does not begin at chance again."""
    last = load_file(finished / "stage2" / HEADS)
    kept = load_file(finished / "checkpoint" / HEADS)
    assert all(torch.equal(value, kept[name]) for name, value in last.items())
    recipe = msgspec.structs.replace(STAGES, stages=(FIRST,))
    run = TrainingRun(recipe, opened(data), Path("unused"), silent, start=str(finished / "checkpoint"))
    task = run.task(0)
    run._begin(task, 0, None)
    assert isinstance(task, CaptionTask)
    heads = task.with_heads.alignment.state_dict()
    assert all(torch.equal(value, heads[name]) for name, value in last.items())


def test_several_pictures_and_episodes_of_the_data_train_beside_captions(start, tmp_path):
    data = mixed_data(tmp_path / "mixed")
    recipe = msgspec.structs.replace(STAGES, stages=(FIRST,))
    assert train(recipe, opened(data), tmp_path / "run", silent, start=str(start))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("attention/entropy" in row for row in rows)


def test_a_row_sees_no_memory_that_holds_its_picture_or_its_answer(data, start):
    task = make_task(data, start)
    seen = 0
    for step in range(6):
        batch = task.draw_step(step, step_generator(0, 0, step, 0))
        for row, memory in enumerate(batch.visible_memory):
            if memory < 0:
                continue
            seen += 1
            written = batch.episodes.written[memory]
            own = {number for number, other in enumerate(batch.caption_row) if other == row}
            texts = {batch.caption_texts[number] for number in written if number >= 0}
            assert not own.intersection(written.tolist())
            assert batch.caption_texts[next(iter(own))] not in texts
    assert seen > 3


def test_a_run_that_is_cut_between_two_stages_ends_with_the_weights_of_an_unbroken_one(
    finished, data, start, tmp_path
):
    """The second process has not run the first stage, whose draws must therefore not matter."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in ("stage2", "checkpoint", "best", "metrics.jsonl", "evaluations.jsonl"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    torch.manual_seed(12345)
    torch.randn(7)
    assert train(STAGES, opened(data), out, silent, start=str(start))
    unbroken = weights(finished / "checkpoint")
    assert all(torch.equal(value, unbroken[name]) for name, value in weights(out / "checkpoint").items())


def test_untouched_weights_keep_their_precision_and_trained_ones_theirs_in_both_checkpoints(
    data, start, tmp_path
):
    half = tmp_path / "half"
    shutil.copytree(start, half)
    tensors = {name: tensor.bfloat16() for name, tensor in weights(start).items()}
    save_file(tensors, half / "model.safetensors", {"format": "pt"})
    out = tmp_path / "run"
    assert train(STAGES, opened(data), out, silent, start=str(half))
    last, best = weights(out / "checkpoint"), weights(out / "best")
    assert {name: tensor.dtype for name, tensor in last.items()} == {
        name: tensor.dtype for name, tensor in best.items()
    }
    assert last["decoder.norm.weight"].dtype == torch.bfloat16
    assert last["adapter.fc1.weight"].dtype == torch.float32


def test_a_ternary_start_keeps_the_bytes_of_its_frozen_layers(data, speaking_checkpoint, tmp_path):
    model = MicroVLM.from_pretrained(speaking_checkpoint)
    packed = lower(model, WeightFormat(1.58, "2bit", 8))
    packed.config = dataclasses.replace(
        model.config, quantization=QuantizationConfig(decoder_bits=1.58, vision_bits=8, embedding_bits=8)
    )
    packed.directory = model.directory
    packed.save_pretrained(tmp_path / "packed")
    recipe = msgspec.structs.replace(STAGES, stages=(FIRST,))
    assert train(recipe, opened(data), tmp_path / "run", silent, start=str(tmp_path / "packed"))
    before, after = weights(tmp_path / "packed"), weights(tmp_path / "run" / "checkpoint")
    for name, tensor in before.items():
        if name.startswith(("decoder.", "vision.")):
            assert torch.equal(tensor, after[name]), name


def test_relations_are_compared_as_softmax_of_unit_rows():
    torch.manual_seed(0)
    student, teacher = (tuple(torch.randn(1, 2, 3, 4) for _ in range(3)) for _ in range(2))
    mask = torch.tensor([[1, 1, 0]])
    expected = []
    for own, other in zip(student, teacher, strict=True):
        relations = []
        for part in (own, other):
            rows = torch.nn.functional.normalize(part[0, :, :2].double(), dim=-1)
            relations.append((rows @ rows.mT).softmax(-1))
        expected.append((relations[1] * (relations[1] / relations[0]).log()).sum(-1).mean())
    value = relation_divergence(student, teacher, mask, groups=2)
    assert float(value) == pytest.approx(float(sum(expected) / 3), rel=1e-4)


def test_a_teacher_must_be_float_and_come_first(data, start, speaking_checkpoint, tmp_path):
    stage = msgspec.structs.replace(SECOND, caption=CaptionOptions(trained=NEW, teacher=TeacherOptions()))
    with pytest.raises(UserError, match="make it the first stage"):
        train(
            msgspec.structs.replace(STAGES, stages=(FIRST, stage)),
            opened(data),
            tmp_path / "a",
            silent,
            start=str(start),
        )
    alone = msgspec.structs.replace(STAGES, stages=(stage,))
    with pytest.raises(UserError, match="is ternary: give --start a float model"):
        train(alone, opened(data), tmp_path / "b", silent, start=str(speaking_checkpoint))


@pytest.mark.posix
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_an_error_in_a_worker_is_the_same_sentence(data, start, tmp_path, monkeypatch):
    def fails(*_):
        raise UserError("a picture of the data set cannot be read: build the data folder again.")

    monkeypatch.setattr("microvlm.training.batches.caption_batches.draw_view", fails)
    with pytest.raises(UserError, match=r"^a picture of the data set cannot be read"):
        train(STAGES, opened(data), tmp_path / "run", silent, start=str(start), workers=1)


def test_running_out_of_memory_is_one_sentence(data, start, tmp_path, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(CaptionTask, "loss", fails)
    with pytest.raises(UserError, match="needs more memory than there is: give a smaller --batch-size"):
        train(STAGES, opened(data), tmp_path / "run", silent, start=str(start))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_a_run_can_begin_at_a_later_stage_of_a_recipe_for_existing_models(data, start, tmp_path):
    out = tmp_path / "run"
    assert train(STAGES, opened(data), out, silent, start=str(start), start_stage="stage2")
    assert not (out / "stage1").exists()
    report = json.loads((out / "summary.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["stage2"]


def test_chance_levels_count_equal_captions():
    assert chance_loss(["a", "b", "c", "d"]) == pytest.approx(math.log(4))
    assert chance_loss(["a", "a", "b", "b"]) == pytest.approx(math.log(3))
    assert chance_recall(["a", "a", "b", "b"]) == 0.5
