"""A teacher's outputs on texts, kept for later epochs: the losses are those of a teacher that is asked each time."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from assembled_start import assembled_start

from microvlm.errors import UserError
from microvlm.training.caption_options import CaptionOptions, TeacherOptions
from microvlm.training.recipe import Recipe, StageConfig
from microvlm.training.stages.task import DataFolder
from microvlm.training.stages.texts import TextTask
from microvlm.training.trainer import TrainingRun, open_data, train

TEACHER = TeacherOptions(relation_weight=10.0)


def recipe(teacher: TeacherOptions, steps: int = 24) -> Recipe:
    """Steps of 8 texts of about 90: more than two epochs."""
    stage = StageConfig(
        "distill",
        "texts",
        steps,
        8,
        1e-3,
        decoder_bits=1.58,
        label_smoothing=0.0,
        caption=CaptionOptions(trained={"decoder": 1.0}, teacher=teacher),
    )
    return Recipe("kept", None, 0, (stage,), mixed_precision="no", log_every=1, save_every=10)


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_processor) -> Path:
    return assembled_start(tmp_path_factory.mktemp("start") / "start", tiny_processor.tokenizer)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    things = ["cat", "dog", "house", "tree", "car"]
    lines = [
        {"text": f"a {a} and {n} {b}" + " beside it" * (n % 3)}
        for n in range(4)
        for a in things
        for b in things
    ]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def task_of(chosen: Recipe, texts: Path, start: Path, out: Path) -> TextTask:
    run = TrainingRun(chosen, open_data(chosen, [DataFolder(texts)]), out, lambda _: None, start=str(start))
    task = run.task(0)
    assert isinstance(task, TextTask)
    run._begin(task, 0, None)
    return task


def test_kept_outputs_are_the_computed_ones(texts, start, tmp_path):
    task = task_of(recipe(TEACHER), texts, start, tmp_path / "run")
    rows = task.draw_step(1, torch.Generator())
    expected = task.teacher.compare_texts(task.model, rows)
    task.prepare()
    assert task.teacher.kept is not None
    assert len(task.teacher.kept) == len(set(task.texts))
    assert task.teacher.kept.of(rows) is not None
    for one, other in zip(task.teacher.compare_texts(task.model, rows), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # A text that is none of the run's is computed.
    strange = task.token_rows.build(["a tree and a tree and a tree"])
    assert task.teacher.kept.of(strange) is None
    task.teacher.compare_texts(task.model, strange)


@pytest.mark.parametrize(("gigabytes", "steps"), [(0.0, 24), (1e-6, 24), (2.0, 12)])
def test_nothing_is_kept_that_does_not_fit_or_is_seen_once(texts, start, tmp_path, gigabytes, steps):
    options = msgspec.structs.replace(TEACHER, kept_gb=gigabytes)
    task = task_of(recipe(options, steps), texts, start, tmp_path / "run")
    task.prepare()
    assert task.teacher.kept is None


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_a_run_with_kept_outputs_has_the_losses_of_one_without_and_resumes(texts, start, tmp_path):
    results = {}
    for name, gigabytes in (("kept", 2.0), ("asked", 0.0)):
        chosen = recipe(msgspec.structs.replace(TEACHER, kept_gb=gigabytes))
        data = open_data(chosen, [DataFolder(texts)])
        assert train(chosen, data, tmp_path / name, lambda _: None, start=str(start))
        results[name] = losses(tmp_path / name)
    # Sums in another order round a few trits the other way, and the runs part slowly.
    assert results["kept"][:4] == pytest.approx(results["asked"][:4], rel=1e-4)
    assert results["kept"] == pytest.approx(results["asked"], rel=2e-2)
    chosen = recipe(TEACHER)
    for stop in (15, None):
        data = open_data(chosen, [DataFolder(texts)])
        done = train(chosen, data, tmp_path / "resumed", lambda _: None, start=str(start), stop_after=stop)
        assert done == (stop is None)
    assert losses(tmp_path / "resumed") == results["kept"]


def test_a_teacher_on_a_named_device(texts, start, tmp_path):
    task = task_of(recipe(msgspec.structs.replace(TEACHER, device="cpu")), texts, start, tmp_path / "run")
    rows = task.draw_step(0, torch.Generator())
    named = task.teacher.compare_texts(task.model, rows)
    task.teacher.options = TEACHER
    for one, other in zip(task.teacher.compare_texts(task.model, rows), named, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here_is_refused(texts, start, tmp_path):
    with pytest.raises(UserError, match="finds no GPU here"):
        task_of(recipe(msgspec.structs.replace(TEACHER, device="cuda:1")), texts, start, tmp_path / "run")


def test_older_runs_have_no_keys_for_the_defaults():
    plain = recipe(TEACHER).to_dict()["stages"][0]["caption"]["teacher"]
    changed = recipe(msgspec.structs.replace(TEACHER, kept_gb=1.0, device="cuda")).to_dict()
    assert not {"device", "kept_gb"} & set(plain)
    assert changed["stages"][0]["caption"]["teacher"]["kept_gb"] == 1.0
    assert changed["stages"][0]["caption"]["teacher"]["device"] == "cuda"
