"""Calibration of answers: isotonic regression, threshold, measures against hand-computed ones, and the command."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microvlm.answers.answering import Answer
from microvlm.bench.report import read_report
from microvlm.bench.scores.answer_plots import plots
from microvlm.config import AnswersConfig, MicroVLMConfig
from microvlm.console import run_click
from microvlm.errors import UserError
from microvlm.sources.model_source import find_model
from microvlm.training.data.annotations import Annotations
from microvlm.training.data.caption_data import CaptionSample, Turn
from microvlm.training.data.images.build import BuildOptions, build
from microvlm.training.data.images.conversation import Columns
from microvlm.training.data.images.sources import open_sources
from microvlm.training.data.strangers.strangers_command import KIND_NAMES, write_strangers
from microvlm.training.honesty import honesty_scores
from microvlm.training.honesty.calibration import (
    Block,
    choose_threshold,
    fit_answers,
    pool_adjacent_violators,
    reduce_blocks,
)
from microvlm.training.honesty.honesty_scores import measure
from microvlm.training.honesty.items import Item, Said, _items, answer_items, is_right
from microvlm.training.honesty.measures import auroc, calibration_bins, calibration_error, risks
from microvlm.training.scoring.score_command import command

EVALSET = Path(__file__).parent.parent / "bench" / "evalset"


def pav(places, values):
    return pool_adjacent_violators(np.array(places, float), np.array(values, float))


def test_isotonic_regression_by_hand():
    assert pav([1, 2, 3], [0, 0.5, 1]) == [Block(1, 0, 1), Block(2, 0.5, 1), Block(3, 1, 1)]
    # 1 and 0 pool to .5; the later 0 pulls it down to 1/3.
    assert pav([4, 1, 2, 3], [1, 1, 0, 0]) == [Block(2, pytest.approx(1 / 3), 3), Block(4, 1, 1)]
    assert pav([1, 2, 3, 4], [1, 1, 0, 0]) == [Block(2.5, 0.5, 4)]
    # Equal places are one block, whatever their order.
    assert pav([2, 2, 1], [1, 0, 0]) == [Block(1, 0, 1), Block(2, 0.5, 2)]


@given(st.lists(st.tuples(st.integers(-20, 0), st.booleans()), min_size=1, max_size=60))
def test_isotonic_regression_keeps_the_mean_rises_and_is_at_least_as_near_as_a_constant(pairs):
    places, values = np.array(pairs, float).T
    blocks = pav(places, values)
    assert all(a.value < b.value and a.place < b.place for a, b in pairwise(blocks))
    assert sum(b.value * b.weight for b in blocks) == pytest.approx(values.sum())
    fewer = reduce_blocks(blocks, 3)
    assert len(fewer) == min(3, len(blocks))
    assert sum(b.value * b.weight for b in fewer) == pytest.approx(values.sum())
    assert all(a.value < b.value for a, b in pairwise(fewer))


def test_the_neighbours_that_differ_least_are_merged():
    blocks = [Block(-3, 0.0, 2), Block(-2, 0.5, 2), Block(-1, 0.6, 2)]
    assert reduce_blocks(blocks, 2) == [Block(-3, 0, 2), Block(-1.5, pytest.approx(0.55), 4)]


def test_the_threshold_declines_a_twentieth_of_the_right_answers_and_no_more():
    confidences = np.arange(100) / 100
    assert choose_threshold(confidences) == 0.05
    assert (confidences < choose_threshold(confidences)).sum() == 5
    assert choose_threshold(confidences[:19]) == 0.0
    assert choose_threshold(confidences[:20]) == 0.01
    # Equal ones are declined together or not at all.
    assert choose_threshold(np.array([0.2] * 10 + [0.9] * 90)) == 0.2


def test_a_fit_has_at_most_32_points_and_a_threshold_that_obeys_the_rule():
    generator = np.random.default_rng(0)
    values = -generator.exponential(2, 3000)
    right = generator.random(3000) < np.exp(values)
    fitted = fit_answers(values, right, AnswersConfig(decline="no idea"))
    assert 2 <= len(fitted.points) <= 32
    assert fitted.decline == "no idea"
    confidences = np.array([fitted.confidence(value) for value in values])
    declined = (confidences[right] < fitted.threshold).mean()
    assert 0.04 < declined <= 0.05
    # The truth is exp(value): the map is near it, and its error on fresh answers is small.
    fresh = -generator.exponential(2, 4000)
    fresh_right = generator.random(4000) < np.exp(fresh)
    assert calibration_error(np.array([fitted.confidence(value) for value in fresh]), fresh_right) < 0.03


def test_the_calibration_error_by_hand():
    confidences, right = np.array([0.9, 0.8, 0.1, 0.2]), np.array([1, 0, 0, 0])
    # Fewer answers than bins: each is its own bin.
    assert calibration_error(confidences, right) == pytest.approx((0.1 + 0.8 + 0.1 + 0.2) / 4)
    many = np.repeat(confidences, 15), np.tile(right, 15)
    bins = calibration_bins(*many)
    assert [part["count"] for part in bins] == [4] * 15
    assert bins[0]["confidence"] == pytest.approx(0.1)


def test_risks_by_hand_with_equally_sure_answers_sharing_theirs():
    sureness, right = np.array([-1.0, -3.0, -2.0, -np.inf]), np.array([1, 0, 1, 0], bool)
    assert risks(sureness, right).tolist() == [0, 0, pytest.approx(1 / 3), 0.5]
    tied = risks(np.array([-1.0, -1.0]), np.array([0, 1], bool))
    assert tied.tolist() == risks(np.array([-1.0, -1.0]), np.array([1, 0], bool)).tolist() == [0.5, 0.5]


def test_the_area_under_the_roc_by_hand():
    assert auroc(np.array([3.0, 2.0]), np.array([1.0, 2.0])) == (2 + 1.5) / 4
    assert auroc(np.array([1.0]), np.array([-np.inf])) == 1
    assert auroc(np.array([]), np.array([1.0])) is None


def test_an_article_before_a_name_does_not_matter():
    assert is_right("a red heart", ["heart", "The red heart."])
    assert is_right("tabby", ["a tabby"])
    assert not is_right("a", ["the"])
    assert not is_right("heart", ["red heart"])


def answered(value: float, right: bool, declines: str = "", confidence: float | None = None, declined=False):
    return Said(Item("k", None, (b"",), ("x",), declines), value, confidence, declined, right)


def test_measures_tell_known_things_from_strangers_and_own_words_from_low_confidence():
    said = [
        answered(-0.1, True, "", 0.9),
        answered(-3.0, True, "", 0.2, True),
        answered(-1.0, False, "", 0.6),
    ]
    said += [answered(-2.0, False, "noise", 0.3, True), answered(-np.inf, False, "noise", None, True)]
    said += [answered(-0.2, False, "clutter", 0.8)]
    document = measure(said, AnswersConfig((-3.0, -0.1), (0.2, 0.9), 0.5))
    everything, captions = document["known"]
    assert (everything["kind"], captions["kind"], everything["count"]) == ("all", "captions", 3)
    assert [everything[name]["value"] for name in ("right", "wrong", "declined")] == [
        pytest.approx(1 / 3)
    ] * 3
    assert everything["right_declined"]["value"] == 0.5
    noise, clutter = document["strangers"]
    assert (noise["kind"], noise["declined"]["value"], noise["own_words"]) == ("noise", 1.0, 0.5)
    assert (clutter["kind"], clutter["declined"]["value"]) == ("clutter", 0.0)
    assert noise["auroc"] == 0.75
    assert sum(part["count"] for part in document["calibration"]["bins"]) == 5
    assert document["risk_coverage"]["curve"][-1]["value"] == pytest.approx(1 / 3)
    assert document["auroc"] == 0.5


def test_a_label_and_its_synonyms_are_right_answers_to_what_a_picture_is():
    known = Annotations(label="tabby", synonyms=("tabby cat",))
    turns = (Turn("a cat"), Turn("red", "what colour is it?"), Turn("no", "is it?", declines="absent"))
    naming, colour, absent = _items(CaptionSample("k", (b"",), turns, known))
    assert (naming.answers, naming.kind) == (("a cat", "tabby", "tabby cat"), "captions")
    assert (colour.answers, colour.kind) == (("red",), "what colour")
    assert (absent.answers, absent.kind) == ((), "absent")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawings with their names, and pictures without a thing in them, most of them in the validation split."""
    folder = tmp_path_factory.mktemp("honest")
    write_strangers(folder / "strangers", 20, 0, 96)
    images = json.loads((EVALSET / "evalset.json").read_text())["images"][:120]
    lines = [{"image": str(EVALSET / row["file"]), "caption": row["caption"]} for row in images]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tables = [str(folder / "captions.jsonl"), str(folder / "strangers" / "captions.jsonl")]
    sources = open_sources(tables, Columns(), 1000, "train")
    build(sources, folder / "data", BuildOptions(validation=0.8, test=0.19), 0, lambda *_: None)
    return folder / "data"


@pytest.fixture
def run(capsys: pytest.CaptureFixture):
    """Arguments -> (status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            run_click(command, [str(argument) for argument in arguments])
        return exit_info.value.code, *capsys.readouterr()

    return call


def test_a_model_that_was_never_calibrated_declines_in_its_own_words():
    """Words that decline are no name that could be wrong, so no calibration counts them."""
    config = MicroVLMConfig.load(find_model("nano").folder)
    assert config.answers is None
    words = ("i don't know what this is", "pizza")

    def answer(pictures, questions):
        return [Answer(text, text, [], -0.5, None, False, False) for text in words]

    picture = (EVALSET / "images" / "1f355.png").read_bytes()
    items = [Item("a", None, (picture,), (), "noise"), Item("b", None, (picture,), ("pizza",), "")]
    declined, named = answer_items(SimpleNamespace(config=config, answer=answer), items, lambda done: None)
    assert (declined.names, declined.declined, declined.right) == (False, True, False)
    assert (named.names, named.declined, named.right) == (True, False, True)


def test_a_fit_changes_the_checkpoints_answers_alone_and_the_test_split_measures_it(data, run, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(find_model("nano").folder, model)
    before = MicroVLMConfig.load(model)
    status, out, err = run(model, "--data", data, "--fit-answers", "--json")
    assert (status, "threshold" in err) == (0, True), err
    document = json.loads(out)
    answers = MicroVLMConfig.load(model).answers
    assert MicroVLMConfig.load(model) == dataclasses.replace(before, answers=answers)
    assert (document["fitted"], document["data"]["split"]) == (True, "validation")
    assert document["threshold"] == answers.threshold > 0
    assert document["known"][0]["right_declined"]["value"] <= 0.05
    status, out, _ = run(
        model, "--data", data, "--scores", "answers", "--json", "--plots", tmp_path / "plots"
    )
    measured = json.loads(out)
    assert (status, measured["fitted"], measured["data"]["split"]) == (0, False, "test")
    assert {row["kind"] for row in measured["strangers"]} <= set(KIND_NAMES)
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "reliability.svg",
        "risk_coverage.svg",
    ]
    tables = {table.name: table.rows for table in read_report(measured).tables}
    assert set(tables) == {"known", "strangers", "confidence", "calibration", "curve"}
    assert sum(int(count) for _, count, _ in tables["calibration"][1:]) == sum(
        part["count"] for part in measured["calibration"]["bins"]
    )
    assert tables["known"][1][0] == "all"
    assert all("<svg" in drawing for drawing in plots(measured).values())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nano", "--fit-answers"), "'nano' is not one: copy the checkpoint into a folder of its own"),
        (("nano", "--fit-answers", "--split", "all"), "--fit-answers never uses the test split"),
        (("nano", "--fit-answers", "--split", "test"), "--fit-answers never uses the test split"),
        (
            ("nano", "--fit-answers", "--scores", "captions"),
            "belongs to the scores 'answers', not 'captions'",
        ),
        (("nano", "--scores", "answers", "--against", "nano"), "--against is not an option of the scores"),
    ],
)
def test_what_cannot_be_fitted_or_scored_is_one_sentence(arguments, sentence, data, run):
    status, out, err = run(*arguments, "--data", data)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert sentence in err


def test_too_few_right_answers_are_no_calibration_and_nothing_is_written():
    with pytest.raises(UserError, match=r"^49 of 60 answers are right, and a calibration needs 50 or more"):
        honesty_scores.fit([answered(-1.0, number < 49) for number in range(60)], None)
