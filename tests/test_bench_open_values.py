"""Values that no training saw, and the fit of the confidence: on made-up evidence, and into a checkpoint's file."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from microvlm.bench.memory.open_values.fact_pool import is_on_white
from microvlm.bench.memory.open_values.pointed_queries import PointedQueries
from microvlm.bench.memory.open_values.pointing_fit import check_writable, write_pointing
from microvlm.bench.memory.open_values.pointing_regression import (
    Sample,
    calibration_error,
    choose_thresholds,
    fit_maps,
    fit_weights,
    shares_by_kind,
)
from microvlm.bench.memory.open_values.values import KINDS, open_value, open_values
from microvlm.config import MicroVLMConfig
from microvlm.configuration.pointing import EVIDENCE, PointingConfig, PointingWeights
from microvlm.errors import UserError


def sample(
    kind: str,
    known: bool,
    share: float,
    *,
    pictured: bool = True,
    same: tuple[bool, bool] | None = None,
    named: str = "share",
    count: int = 400,
) -> Sample:
    """Readings whose evidence `named` is about `share`, all of which point at entry 0.

    `same` says whether that is about the same picture and answers the same question; as `known`, if left out.
    """
    rng = np.random.default_rng(len(kind))
    evidence = rng.normal(size=(count, 1, len(EVIDENCE)))
    evidence[..., EVIDENCE.index(named)] = share + 0.1 * rng.normal(size=(count, 1))
    answers = np.zeros(count, int) if known else np.full(count, -2)
    pointed = PointedQueries(np.zeros((count, 1), int), evidence, np.full(count, pictured))
    labels = (np.full((count, 1), label) for label in same or (known, known))
    return Sample(kind, 8, pointed, answers, *labels)


def test_values_are_made_by_seed_of_every_kind_and_differ():
    first, again = (open_values(200, np.random.default_rng(3)) for _ in range(2))
    assert first == again
    assert len(set(first)) == 200
    assert any(not value.isascii() for value in first)
    assert {value.isdigit() for value in first} == {True, False}
    assert all(open_value(kind, np.random.default_rng(0)) for kind in KINDS)
    with pytest.raises(ValueError, match="no kind of value"):
        open_value("colour", np.random.default_rng(0))


def test_the_fit_finds_the_number_that_tells_facts_from_strangers():
    samples = [sample("view", True, 0.9), sample("stranger", False, 0.4)]
    weights = fit_weights(samples, Sample.is_right)
    others = [abs(getattr(weights, name)) for name in EVIDENCE if name != "share"]
    assert weights.share > 5 * max(others)
    (threshold,) = choose_thresholds(samples, [weights], slots=64)
    pointing = PointingConfig(threshold, weights)
    shares = {row["kind"]: row for row in shares_by_kind(samples, pointing)}
    assert (shares["view"]["known"], shares["stranger"]["known"]) == (True, False)
    assert shares["view"]["right"] > 0.95
    assert shares["stranger"]["said"] <= 0.05
    assert calibration_error(samples, pointing) < 0.1


def test_picture_question_and_words_have_a_regression_each():
    def about(pictures: float, questions: float, kind: str) -> Sample:
        same = (pictures > 0.5, questions > 0.5)
        made = sample(kind, all(same), pictures, same=same, named="picture_cosine")
        made.pointed.evidence[..., EVIDENCE.index("question_cosine")] = questions
        return made

    samples = [
        about(0.9, 0.9, "view"),
        about(0.1, 0.9, "stranger, another picture"),
        about(0.9, 0.1, "stranger, another question"),
        sample("text", True, 0.9, pictured=False),
        sample("stranger, no picture", False, 0.4, pictured=False),
    ]
    pointing = fit_maps(samples, samples, slots=64)
    assert pointing.same_picture is not None
    assert pointing.same_question is not None
    picture, question = pointing.same_picture.weights, pointing.same_question.weights
    assert picture.picture_cosine > 2 * abs(picture.question_cosine)
    assert question.question_cosine > 2 * abs(question.picture_cosine)
    shares = {row["kind"]: row for row in shares_by_kind(samples, pointing)}
    assert min(shares[kind]["right"] for kind in ("view", "text")) > 0.95
    assert max(row["said"] for row in shares.values() if not row["known"]) <= 0.05
    assert calibration_error(samples, pointing) < 0.1


def test_the_threshold_rises_until_strangers_of_every_kind_are_out():
    samples = [sample("view", True, 0.9), sample("near", False, 0.8), sample("far one", False, 0.1)]
    weights = PointingWeights(**dict.fromkeys(EVIDENCE, 0.0), constant=-8.0)
    weights = dataclasses.replace(weights, share=10.0)
    (threshold,) = choose_thresholds(samples, [weights], slots=64)
    below = PointingConfig(threshold - 0.02, weights)
    said = {row["kind"]: row["said"] for row in shares_by_kind(samples, below)}
    assert said["near"] > 0.05 > said["far one"]


def test_a_reading_that_points_at_nothing_is_never_said():
    nothing = PointedQueries(
        np.full((3, 2), -1), np.zeros((3, 2, len(EVIDENCE))), np.array([True, False, True])
    )
    sure = PointingWeights(**dict.fromkeys(EVIDENCE, 0.0), constant=50.0)
    entries, confidence, is_said = nothing.surest(PointingConfig(0.0, sure))
    assert (entries.tolist(), confidence.tolist(), is_said.tolist()) == ([-1] * 3, [0.0] * 3, [False] * 3)


def test_the_numbers_go_into_a_checkpoints_configuration_and_into_nothing_else(
    speaking_checkpoint, speaking_bundle, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(speaking_checkpoint, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pointing = PointingConfig(0.125, PointingWeights(share=2.0))
    check_writable(folder)
    write_pointing(folder, pointing)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"config.json"}
    assert MicroVLMConfig.load(folder).memory.pointing == pointing
    old, new = (json.loads(files["config.json"]) for files in (before, after))
    del old["memory"], new["memory"]
    assert old == new
    with pytest.raises(UserError, match="is a bundle: fit its checkpoint"):
        check_writable(speaking_bundle)


def test_a_drawing_on_white_is_told_from_a_photograph():
    white = np.full((8, 8, 3), 255, np.uint8)
    assert is_on_white(white)
    dark = white.copy()
    dark[-1, -1] = 0
    assert not is_on_white(dark)
