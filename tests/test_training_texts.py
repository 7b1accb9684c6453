"""Stage `texts`: a decoder is distilled from its teacher on plain texts, and scored against what counting gives."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from assembled_start import assembled_start

from microvlm import MicroVLM
from microvlm.bench.report import report_of_file
from microvlm.console import run_click
from microvlm.errors import UserError
from microvlm.inputs.processor import Processor
from microvlm.inputs.text_data import open_texts
from microvlm.training.batches.sample_texts import IGNORED
from microvlm.training.batches.token_rows import MOST_TOKENS, ROW_MULTIPLE, TokenRows
from microvlm.training.caption_options import CaptionOptions, TeacherOptions
from microvlm.training.data.data_command import command as data_group
from microvlm.training.loop.run_summary import _curve
from microvlm.training.recipe import Recipe, StageConfig
from microvlm.training.scoring.score_command import command as score_commandline
from microvlm.training.stages import texts as texts_stage
from microvlm.training.stages.task import DataFolder
from microvlm.training.trainer import TrainingRun, open_data, train
from microvlm.training.watching import names

DISTILL = StageConfig(
    "distill",
    "texts",
    12,
    8,
    2e-3,
    decoder_bits=1.58,
    label_smoothing=0.0,
    caption=CaptionOptions(trained={"decoder": 1.0}, teacher=TeacherOptions(relation_weight=10.0)),
)
RECIPE = Recipe("texts", None, 0, (DISTILL,), mixed_precision="no", log_every=1, save_every=4)
THINGS = ["cat", "dog", "house", "tree", "car", "boat", "apple", "hat"]


def caller(command, capsys):
    """Arguments -> (status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            run_click(command, [str(argument) for argument in arguments])
        return int(exit_info.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def score(capsys):
    return caller(score_commandline, capsys)


@pytest.fixture
def data_command(capsys):
    return caller(data_group, capsys)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "captions.jsonl"
    rng = np.random.default_rng(0)
    lines = [{"captions": [f"a {a} and a {b}", f"{b} beside a {a}"]} for a, b in rng.choice(THINGS, (80, 2))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_processor) -> Path:
    return assembled_start(tmp_path_factory.mktemp("start") / "start", tiny_processor.tokenizer)


@pytest.fixture(scope="module")
def run(texts, start, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    assert train(RECIPE, open_data(RECIPE, [DataFolder(texts)]), folder, lambda _: None, start=str(start))
    return folder


def test_a_decoder_is_distilled_on_texts_into_ternary_weights_and_comes_nearer_to_its_teacher(run, start):
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    kl = [row["evaluation/kl"] for row in rows]
    assert kl[-1] < kl[0]
    student, teacher = MicroVLM.from_pretrained(run / "checkpoint"), MicroVLM.from_pretrained(start)
    assert student.config.quantization.decoder_bits == 1.58
    assert student.config.text.sub_norm
    before, after = teacher.state_dict(), student.state_dict()
    frozen = [name for name in before if name.split(".")[0] in ("adapter", "vision") and name in after]
    assert len(frozen) > 10
    assert all(torch.equal(before[name], after[name]) for name in frozen)


def test_a_stopped_run_goes_on_to_the_same_weights(run, texts, start, tmp_path):
    data = open_data(RECIPE, [DataFolder(texts)])
    assert not train(RECIPE, data, tmp_path / "run", lambda _: None, stop_after=5, start=str(start))
    assert train(RECIPE, data, tmp_path / "run", lambda _: None, start=str(start))
    whole, parts = (MicroVLM.from_pretrained(f / "checkpoint").state_dict() for f in (run, tmp_path / "run"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_scores_stand_between_the_teacher_and_the_uniform_distribution(run, texts, start, score, tmp_path):
    output = tmp_path / "texts.json"
    status, _, error = score(
        run / "checkpoint", "--data", texts, "--against", start, "--beside", start, "-o", output
    )
    assert status == 0, error
    document = json.loads(output.read_text())
    rows = {row["name"]: row for row in document["rows"]}
    assert set(rows) == {"model", "start", "rounding", "unigram", "uniform", "teacher"}
    assert rows["start"] == rows["teacher"] | {"name": "start"}
    assert (rows["teacher"]["kl"]["value"], rows["teacher"]["top1"]["value"]) == (0.0, 1.0)
    vocabulary = MicroVLM.from_pretrained(start).config.text.vocab_size
    assert rows["uniform"]["nats"]["value"] == pytest.approx(math.log(vocabulary), rel=1e-5)
    # The entropy of the teacher is what the uniform distribution's KL lacks to log V.
    assert 0 < rows["uniform"]["kl"]["value"] < math.log(vocabulary)
    assert 0 < rows["rounding"]["kl"]["value"] < rows["uniform"]["kl"]["value"]
    assert rows["model"]["kl"]["low"] > 0
    held_out = open_texts(texts).validation
    tokens = TokenRows(Processor.from_pretrained(start))
    assert document["data"]["tokens"] == sum(len(tokens.tokens(text)) - 1 for text in held_out)
    assert "same likeliest token" in report_of_file(output).text()


def test_texts_of_one_line_are_in_one_split_and_packed_lines_are_the_same(texts, tmp_path):
    data = open_texts(texts)
    lines = [json.loads(line)["captions"] for line in texts.read_text().splitlines()]
    assert sorted(data.train + data.validation) == sorted(text for line in lines for text in line)
    train_texts = set(data.train) - set(data.validation)
    assert all(
        len({text in train_texts for text in line if text not in data.validation}) <= 1 for line in lines
    )
    packed = tmp_path / "captions.jsonl.gz"
    packed.write_bytes(gzip.compress(texts.read_bytes()))
    assert (open_texts(packed).train, open_texts(packed).validation) == (data.train, data.validation)


def test_prose_is_cut_into_whole_paragraphs(tmp_path):
    path = tmp_path / "book.txt"
    paragraphs = [f"paragraph {number} " + "word " * 60 for number in range(200)]
    path.write_text("\n\n".join(paragraphs))
    data = open_texts(path)
    pieces = data.train + data.validation
    assert sum(piece.count("paragraph") for piece in pieces) == 200
    assert 0 < len(data.validation) < len(data.train)
    assert all(piece.startswith("paragraph") and piece.endswith("word") for piece in pieces)


def test_each_token_is_the_label_of_the_one_before(tiny_processor):
    rows = TokenRows(tiny_processor).build(["a cat and a dog", "a " * 500])
    assert rows.ids.shape[1] == MOST_TOKENS
    for ids, mask, labels in zip(*rows, strict=True):
        count = int(mask.sum())
        assert labels[: count - 1].tolist() == ids[1:count].tolist()
        assert set(labels[count - 1 :].tolist()) == {IGNORED}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", "no json\n", "line 1 of"),
        ("a.jsonl", '{"title": "one"}\n', "line 1 of"),
        ("a.jsonl", '{"text": "one"}\n', "too few texts"),
        ("a.jsonl", '{"file_name": "a.jpg", "caption": "one"}\n', "too few texts"),
        ("a.jsonl.gz", "no gzip", "cannot be unpacked"),
        ("a.txt", "", "too few texts"),
        ("a.csv", "a,b", "is no text"),
    ],
)
def test_bad_texts_are_one_sentence(name, content, sentence, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        open_texts(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        open_texts(tmp_path / "none.txt")


def test_a_stage_that_trains_nothing_that_sees_text_is_refused(texts, start, tmp_path):
    stage = StageConfig("texts", "texts", 1, 8, 1e-3)
    recipe = Recipe("texts", None, 0, (stage,))
    with pytest.raises(UserError, match="name 'decoder' in its `trained`"):
        train(
            recipe, open_data(recipe, [DataFolder(texts)]), tmp_path / "run", lambda _: None, start=str(start)
        )
    assert not (tmp_path / "run").exists()


def test_a_model_writes_the_texts_that_it_is_distilled_on(start, tmp_path, data_command):
    output = tmp_path / "sampled.jsonl"
    arguments = ("sampled", start, "-o", output, "--tokens", 640, "--length", 20)
    status, out, error = data_command(*arguments)
    assert (status, out) == (0, f"{output}: 32 texts of 20 tokens\n"), error
    lines = output.read_text().splitlines()
    assert len(set(lines)) > 16
    assert open_texts(output).train
    data_command(*arguments)
    assert output.read_text().splitlines() == lines
    status, _, error = data_command("sampled", start, "-o", tmp_path / "x.jsonl", "--length", 9999)
    assert (status, "--length is 9999; give 2 to" in error) == (2, True)
    assert not (tmp_path / "x.jsonl").exists()


def test_two_models_with_other_tokens_are_not_compared(start, texts, score):
    status, _, error = score("nano", "--data", texts, "--against", start)
    assert (status, "have other tokens" in error) == (2, True)
    status, _, error = score(start, "--data", texts)
    assert (status, "--against is missing" in error) == (2, True)


def test_a_second_stage_begins_with_other_texts_than_the_first(texts, start, tmp_path):
    again = msgspec.structs.replace(DISTILL, name="again")
    recipe = msgspec.structs.replace(RECIPE, stages=(DISTILL, again))
    run = TrainingRun(
        recipe, open_data(recipe, [DataFolder(texts)]), tmp_path, lambda _: None, start=str(start)
    )
    generator = torch.Generator()
    tasks = [run.task(stage) for stage in (0, 1)]
    steps = len(tasks[0].texts) // DISTILL.batch_size
    ids = [[task.draw_step(step, generator).ids for step in range(4 * steps)] for task in tasks]
    assert not any(torch.equal(first, second) for first in ids[0] for second in ids[1])
    assert torch.equal(ids[1][0], run.task(1).draw_step(0, generator).ids)
    assert all(rows.shape[1] % ROW_MULTIPLE == 0 for row in ids for rows in row)


def test_the_console_names_the_two_losses_of_texts(texts, start, tmp_path):
    lines: list[str] = []
    recipe = msgspec.structs.replace(RECIPE, stages=(msgspec.structs.replace(DISTILL, steps=1),))
    train(recipe, open_data(recipe, [DataFolder(texts)]), tmp_path / "run", lines.append, start=str(start))
    (line,) = (line for line in lines if "1/1  held out" in line)
    assert re.search(r"KL from the teacher [\d.]+  cross-entropy of the texts [\d.]+$", line)


def test_an_evaluation_is_the_same_in_chunks_of_any_size(texts, start, tmp_path, monkeypatch):
    run = TrainingRun(
        RECIPE, open_data(RECIPE, [DataFolder(texts)]), tmp_path, lambda _: None, start=str(start)
    )
    task = run.task(0)
    found = []
    for rows in (3, 10_000):
        monkeypatch.setattr(texts_stage, "CHUNK_ROWS", rows)
        with torch.no_grad():
            found.append(task.evaluate(tmp_path, 0))
    in_chunks, whole = found
    assert whole["evaluation/kl"] > 0
    assert in_chunks == pytest.approx(whole, rel=1e-5)


def test_a_curve_counts_the_steps_before_an_evaluation_between_two_logged_lines():
    def line(step: int) -> dict:
        return {names.STAGE_STEP: step, names.STEP_SECONDS: 2.0, names.TOKENS_PER_SECOND: 50.0}

    evaluations = [{"stage_step": step, "evaluation/kl": 1.0} for step in (0, 10, 16, 30)]
    points = _curve([line(1), line(10), line(20), line(30)], evaluations)
    assert [point["tokens"] for point in points] == [0, 1000, 1600, 3000]
    assert [point["seconds"] for point in points] == [0.0, 20.0, 32.0, 60.0]
