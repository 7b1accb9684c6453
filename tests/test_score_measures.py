"""Measures of `microvlm-score`: CIDEr-D and BLEU-4 have the library's numbers; words, intervals, differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from microvlm.training.scoring.answer_scores import commonest_answer, question_kinds
from microvlm.training.scoring.cider import cider_d
from microvlm.training.scoring.held_out import Question
from microvlm.training.scoring.text_measures import answer_measures, is_exact, mean_of, word_f1, words_of

SAID = [
    (
        "a dog runs on the beach",
        ["a brown dog runs along the beach", "a dog is running on the sand by the sea"],
    ),
    (
        "two people sit at a table with food",
        [
            "two people sit at a table",
            "a couple eats food at a table in a restaurant",
            "people at a table with plates of food",
        ],
    ),
    ("a red bus", ["a red double decker bus drives down the street"]),
    ("a cat", ["a cat", "a small cat sleeps on a sofa"]),
    (
        "a man rides a wave on a surfboard in the sea",
        ["a surfer rides a wave", "a man rides a wave on a surfboard in the sea"],
    ),
    ("blue blue blue sky", ["a plane in the blue sky"]),
    (
        "a bowl of fruit on a wooden table",
        ["apples and pears in a bowl on a table", "a bowl of fruit on a table"],
    ),
    ("", ["a train at a station"]),
]
ANSWERS, REFERENCES = [answer for answer, _ in SAID], [references for _, references in SAID]
LIBRARY_CIDER = [
    2.006793410715457,
    4.320283001892897,
    1.1832353044710584,
    2.9356459797283123,
    5.812628617133817,
    1.334900556868864,
    4.449002713324191,
    0.0,
]
"""What pycocoevalcap 1.2's `Cider` gives for each of SAID."""
LIBRARY_BLEU4 = 0.554303481555156
"""What its `Bleu(4)` gives for all of SAID."""


def test_cider_d_has_the_numbers_of_pycocoevalcap():
    scores = cider_d([a.split() for a in ANSWERS], [[r.split() for r in group] for group in REFERENCES])
    assert scores == pytest.approx(LIBRARY_CIDER, abs=1e-12)


def test_cider_d_needs_two_pictures_and_a_caption_of_each():
    with pytest.raises(ValueError, match="two pictures"):
        cider_d([["cat"]], [[["cat"]]])
    with pytest.raises(ValueError, match="caption"):
        cider_d([["cat"], ["dog"]], [[["cat"]], []])


def test_bleu_of_all_answers_is_that_of_pycocoevalcap():
    # The library adds 1e-15 to counts, where ours are exact.
    assert answer_measures(ANSWERS, REFERENCES)["bleu4"].interval().value == pytest.approx(
        LIBRARY_BLEU4, abs=1e-9
    )


def test_captions_equal_to_peoples_have_the_highest_scores():
    measures = answer_measures([group[0] for group in REFERENCES], REFERENCES)
    for name, most in (("exact_match", 1), ("word_f1", 1), ("bleu4", 1)):
        assert measures[name].interval() == pytest.approx((most, most, most))
    assert measures["cider_d"].interval().value > 3 * np.mean(LIBRARY_CIDER) / 2


def test_one_picture_has_no_cider_d():
    assert "cider_d" not in answer_measures(["a cat"], [["a cat"]])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A dog, two CATS.", ["a", "dog", "two", "cats"]),
        ("It\u2019s the dog's", ["it's", "the", "dog's"]),
        ("Stra\u00dfe 42", ["strasse", "42"]),
        ("\u732b\u3068\u72ac cat", ["\u732b", "\u3068", "\u72ac", "cat"]),
        ("?!", ["?!"]),
        ("  ", []),
    ],
)
def test_words_of_a_text(text, words):
    assert words_of(text) == words


def test_an_answer_is_exact_where_its_words_are_those_of_one_reference():
    assert is_exact("A red heart.", ["hearts", "a red heart"])
    assert not is_exact("heart a red", ["a red heart"])


def test_f1_counts_shared_words_with_the_best_reference():
    assert word_f1("a red heart", ["blue", "a big red dog"]) == pytest.approx(2 * 2 / (3 + 4))
    assert word_f1("red red red", ["red"]) == pytest.approx(2 * 1 / 4)
    assert word_f1("", ["red"]) == 0


def test_an_interval_of_a_mean_is_about_two_standard_errors_wide_on_each_side():
    values = np.random.default_rng(0).random(400)
    value, low, high = mean_of(values).interval()
    error = values.std() / math.sqrt(len(values))
    assert value == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_values_of_one_group_are_resampled_together():
    values = np.repeat(np.random.default_rng(2).random(50), 8)
    apart, together = (
        mean_of(values).interval(),
        mean_of(values, [str(n // 8) for n in range(400)]).interval(),
    )
    assert together.value == pytest.approx(apart.value)
    # Eight equal values are one observation.
    assert together.high - together.low == pytest.approx(8**0.5 * (apart.high - apart.low), rel=0.15)


def test_a_paired_difference_is_narrower_than_the_scores_it_compares():
    generator = np.random.default_rng(1)
    hard = generator.random(200)
    first, second = mean_of(hard + 0.1 + 0.01 * generator.random(200)), mean_of(hard)
    value, low, high = first.minus(second)
    assert value == pytest.approx(0.105, abs=0.002)
    assert high - low < 0.05 * (first.interval().high - first.interval().low)
    assert second.minus(second) == (0, 0, 0)


def test_questions_are_counted_by_their_first_two_words_beside_the_commonest_answer():
    asked = [
        *(Question("k", f"What colour is {n}?", (), ("red", "Red.")) for n in range(3)),
        Question("k", "what colour is it?", (), ("blue", "red")),
        Question("k", "How many dogs are there?", (), ("2",)),
        Question("k", "How many?", (), ("3",)),
    ]
    rows = question_kinds(asked, ["red", "blue", "Red", "green", "2", "2"])
    assert [(row["kind"], row["count"], row["exact_match"]["value"]) for row in rows] == [
        ("what colour", 4, 0.5),
        ("how many", 2, 0.5),
    ]
    assert (rows[0]["commonest_answer"], rows[0]["commonest"]) == ("red", 1.0)
    assert rows[1]["commonest"] == 0.5
    assert commonest_answer(asked) == ("red", pytest.approx(4 / 6))


def test_rare_kinds_of_questions_share_a_row():
    asked = [Question("k", f"is{n} it?", (), ("yes",)) for n in range(15)]
    rows = question_kinds(asked, ["yes"] * 15)
    assert [row["kind"] for row in rows][-1] == "others"
    assert sum(row["count"] for row in rows) == 15
    assert len(rows) == 13
