"""Personalisation in `microvlm-bench memory`: weighted accuracy by hand, its baseline, and the curve of many facts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from microvlm.backends import load
from microvlm.bench.bench_command import command
from microvlm.bench.memory.memory_bench import Options, run
from microvlm.bench.memory.model_under_test import ModelUnderTest
from microvlm.bench.memory.personalisation import concept_bench, fact_stream
from microvlm.bench.memory.personalisation.concept_bench import (
    Decisions,
    memory_decisions,
    weighted_accuracy,
    weighted_difference,
)
from microvlm.bench.memory.personalisation.concept_sets import (
    Concept,
    built_in_concepts,
    concepts_of_folder,
    divide,
    made_up_names,
    split,
)
from microvlm.bench.memory.personalisation.nearest_features import NearestFeatures, best_threshold, nearest_of
from microvlm.bench.report import read_report
from microvlm.config import VisionConfig
from microvlm.errors import UserError
from microvlm.inputs.processor import Processor
from microvlm.presets import preset


@pytest.fixture(scope="module")
def model(speaking_bundle) -> ModelUnderTest:
    return ModelUnderTest(
        load("ort", speaking_bundle, threads=1), Processor.from_pretrained(speaking_bundle), 3
    )


def concept(number: int, can_be_written: bool = True) -> Concept:
    picture = np.full((8, 8, 3), number, np.uint8)
    return Concept(f"name{number}", picture, picture + 100, can_be_written)


def decisions(positives: list[int], negatives: list[int]) -> Decisions:
    return Decisions(np.array(positives, bool), np.array(negatives, bool))


def test_weighted_accuracy_is_the_mean_of_both_shares_and_always_declining_has_a_half():
    assert weighted_accuracy(decisions([1, 1, 1, 0], [1, 0])).value == (3 / 4 + 1 / 2) / 2
    declining = weighted_accuracy(decisions([0] * 50, [1] * 3))
    assert declining == (0.5, 0.5, 0.5)
    first = weighted_accuracy(decisions([1, 0, 1, 1], [1, 0, 0]))
    assert first == weighted_accuracy(decisions([1, 0, 1, 1], [1, 0, 0]))
    assert first.low < first.value < first.high
    many = decisions([number % 3 > 0 for number in range(97)], [number % 7 > 0 for number in range(89)])
    assert weighted_accuracy(many, seed=1) != weighted_accuracy(many, seed=2)


def test_a_weighted_difference_is_paired():
    ours, theirs = decisions([1, 1, 0, 1], [1, 1]), decisions([1, 0, 0, 1], [1, 0])
    difference = weighted_difference(ours, theirs)
    assert difference.value == (1 / 4 + 1 / 2) / 2
    assert difference.low >= 0  # no picture is worse, so no resample can be
    assert weighted_difference(ours, ours) == (0.0, 0.0, 0.0)
    assert weighted_difference(theirs, ours).value == -difference.value


@pytest.mark.parametrize(
    ("positives", "negatives", "threshold"),
    [
        ([0.9, 0.8], [0.2, 0.4], (0.4 + 0.8) / 2),
        # Its one positive below the negatives costs less than letting both of these in.
        ([0.9, 0.1, 0.8], [0.2, 0.4], (0.4 + 0.8) / 2),
        ([-np.inf, 0.5], [0.1], (0.1 + 0.5) / 2),
        ([-np.inf], [0.3], 0.3 + 1e-6),
    ],
)
def test_the_threshold_has_the_largest_weighted_accuracy(positives, negatives, threshold):
    assert best_threshold(np.array(positives), np.array(negatives)) == pytest.approx(threshold, abs=1e-9)


def test_the_nearest_row_is_that_of_the_largest_cosine():
    stored = np.array([[1.0, 0.0], [0.0, 1.0]])
    nearest, cosines = nearest_of(np.array([[0.6, 0.8], [1.0, 0.0]]), stored)
    assert nearest.tolist() == [1, 0]
    assert cosines.tolist() == [0.8, 1.0]


def test_features_are_the_mean_of_the_prefix_embeddings_at_length_1(model):
    pictures = [concept(number).written for number in (3, 200)]
    pixels = np.stack([model.processor.pixels(picture) for picture in pictures])
    expected = model.runtime.encode_image(pixels).mean(1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.array_equal(NearestFeatures(model).features(pictures), expected)


def test_concepts_and_strangers_are_apart_and_too_few_are_said():
    concepts = [concept(number, number != 1) for number in range(9)]
    written, strangers = divide(concepts, 4)
    assert [c.name for c in written] == ["name0", "name2", "name3", "name4"]
    assert [c.name for c in strangers] == ["name1", "name5", "name6", "name7", "name8"]
    with pytest.raises(UserError, match="--concepts 6 needs"):
        divide(concepts, 6)
    halves = split([concept(number) for number in range(24)])
    assert len(halves.choosing) == 4
    assert not {c.name for c in halves.choosing} & {c.name for c in halves.scored}
    written, strangers = halves.deal(10)
    assert (len(written), len(strangers)) == (10, 10)


def test_the_packages_drawings_are_enough_for_256_concepts_and_are_dealt_again_alike():
    concepts = built_in_concepts(0)
    written, strangers = concepts.deal(256)
    assert len(written) == 256
    assert len(strangers) >= 50
    names = [c.name for c in (*concepts.choosing, *concepts.scored)]
    assert len(set(names)) == len(names)
    again = built_in_concepts(0)
    assert all(
        a.name == b.name and np.array_equal(a.asked, b.asked)
        for a, b in zip(concepts.scored, again.scored, strict=True)
    )
    assert not np.array_equal(written[0].written, written[0].asked)
    assert made_up_names(3, np.random.default_rng(5)) == made_up_names(3, np.random.default_rng(5))


class KnownMemory:
    """Stands in for FactMemory: knows each fact by its question and the level of its picture, `shift` off at most."""

    def __init__(self, *_: object):
        self.facts: list[tuple[str, str, int]] = []
        self.memory = SimpleNamespace(state_count=1, states=[])

    def write(self, text: str, question: str, image: np.ndarray) -> None:
        self.facts.append((text, question, int(image[0, 0, 0])))

    def forget(self, index: int) -> None:
        del self.facts[index]

    def save(self, path: Path) -> None:
        path.write_bytes(b"x" * 10 * len(self.facts))

    def read(self, question: str, image: np.ndarray, options: object) -> SimpleNamespace:
        level = int(image[0, 0, 0]) - 100
        texts = [text for text, asked, written in self.facts if asked == question and written == level]
        return SimpleNamespace(from_memory=bool(texts), answer=texts[-1] if texts else "not in this memory")


def test_a_positive_needs_its_own_name_and_a_negative_none(model, monkeypatch):
    monkeypatch.setattr(concept_bench, "FactMemory", KnownMemory)
    written = [concept(1), concept(2), concept(3), Concept("name4", concept(4).written, concept(3).asked)]
    strangers = [concept(5), concept(2)]
    found = memory_decisions(model, written, strangers)
    # The fourth is taken for the third, and the second stranger for a concept.
    assert found.positives.tolist() == [True, True, True, False]
    assert found.negatives.tolist() == [True, False]
    assert weighted_accuracy(found).value == 0.625


class NeverForgets(KnownMemory):
    """Says that a row is gone, and goes on to answer from it."""

    def forget(self, index: int) -> None:
        pass


@pytest.mark.parametrize(("memory", "forgotten"), [(KnownMemory, 1.0), (NeverForgets, 0.0)])
def test_the_curve_counts_what_is_known_and_what_comes_back(model, monkeypatch, memory, forgotten):
    monkeypatch.setattr(fact_stream, "FactMemory", memory)
    concepts = [concept(number) for number in range(30)]
    rows = fact_stream.fact_stream(model, concepts, 120, 0, lambda _: None)
    assert [row["writes"] for row in rows] == [100, 120]
    assert [row["live"] for row in rows] == [75, 90]
    for row in rows:
        assert (row["recall"], row["wrong"], row["forgotten"]) == (1.0, 0.0, forgotten)
    assert (rows[0]["asked"], rows[0]["forgotten_asked"]) == (75, 25)
    if memory is KnownMemory:
        assert [row["file_bytes"] for row in rows] == [750, 900]


def test_the_points_of_the_curve_end_at_the_last_write():
    assert fact_stream.points(10_000) == [100, 300, 1000, 3000, 10_000]
    assert fact_stream.points(20) == [20]


def test_the_bench_has_both_tables_and_costs_alone_go_with_them(speaking_bundle):
    document = run(Options(model=str(speaking_bundle), costs=True, repeats=1, concepts=(6, 4), stream=40))
    assert "recall" not in document
    assert [(row["concepts"], row["strangers"]) for row in document["concepts"]] == [
        *((4, "all"), (4, "look-alikes")),
        *((6, "all"), (6, "look-alikes")),
    ]
    for row in document["concepts"]:
        assert row["positives"] == row["concepts"]
        for method in ("memory", "nearest_features"):
            scores = row[method]
            mean = (scores["positives"] + scores["negatives"]) / 2
            assert scores["weighted_accuracy"]["value"] == pytest.approx(mean)
    assert [row["negatives"] <= row["concepts"] for row in document["concepts"][1::2]] == [True, True]
    (row,) = document["stream"]
    assert (row["writes"], row["live"]) == (40, 30)
    assert row["state_bytes"] > 0
    text = read_report(document).text()
    for part in ("weighted accuracy", "look-alikes", "nearest features, above", "recall of live facts"):
        assert part in text


def test_a_users_pictures_are_concepts_by_their_folders(tmp_path):
    from PIL import Image

    for number in range(12):
        folder = tmp_path / f"cup{number:02d}"
        folder.mkdir()
        for view in range(2 if number else 1):
            size = (20, 10) if number == 11 else (20, 20)
            Image.new("RGB", size, (number * 20, view * 200, 0)).save(folder / f"{view}.png")
    concepts = concepts_of_folder(tmp_path, VisionConfig(image_size=16, patch_size=8), 0)
    everything = {c.name: c for c in (*concepts.choosing, *concepts.scored)}
    assert sorted(everything) == [f"cup{number:02d}" for number in range(12)]
    assert not everything["cup00"].can_be_written
    assert everything["cup03"].written[0, 0].tolist() == [60, 0, 0]
    assert everything["cup03"].asked[0, 0].tolist() == [60, 200, 0]
    assert everything["cup11"].written[0, 0].tolist() == [255, 255, 255], "white beside the picture"
    concepts = concepts_of_folder(tmp_path, preset("photo").vision, 0)
    (stretched,) = (c for c in (*concepts.choosing, *concepts.scored) if c.name == "cup11")
    assert stretched.written[0, 0].tolist() == [220, 0, 0]


def test_mistakes_are_one_sentence(speaking_bundle, tmp_path):
    for arguments, words in (
        (["--concepts", "0"], "0"),
        (["--concepts", "500"], "--concepts 500 needs"),
        (["--concepts", "4", "--concept-pictures", str(tmp_path)], "give 12 or more"),
        (["--concepts", "4", "--concept-pictures", str(tmp_path / "none")], "is no folder"),
    ):
        result = CliRunner().invoke(
            command, ["memory", str(speaking_bundle), "--costs", "--repeats", "1", *arguments]
        )
        assert result.exit_code != 0
        assert words in result.output + str(result.exception)
