"""Counting codes, and what verdict which figures give."""

from __future__ import annotations

import numpy as np
import pytest

from microvlm.bench.equivalence.metrics import Agreement, Drift, Metrics, Scores
from microvlm.bench.equivalence.recorded_activations import Comparison, Diverged, Tape, floor_rows
from microvlm.bench.equivalence.transcripts import Answer
from microvlm.bench.equivalence.verdict import AMBIGUOUS, FAIL, PASS, judge, judge_precision
from microvlm.bench.stats import Interval


def right_everywhere() -> Metrics:
    """A million codes compared, 1,000 positions, nothing different."""
    comparison = Comparison(codes=1_000_000, sums=500_000, operator_outputs=500_000)
    agreements = [Agreement(samples=100, equal=100, positions=1000, top1_equal=1000) for _ in range(2)]
    return Metrics(free=agreements[0], replayed=agreements[1], comparison=comparison, replayed_drift=Drift())


def test_no_difference_is_a_pass() -> None:
    assert judge(right_everywhere()).verdict == PASS


def test_a_difference_that_replay_removes_is_ambiguous_and_no_failure() -> None:
    metrics = right_everywhere()
    metrics.free.equal, metrics.free.top1_equal, metrics.free.logits_max_abs_diff = 97, 997, 0.28
    metrics.comparison.codes_differing, metrics.comparison.max_code_step = 6, 1
    metrics.comparison.max_tie_distance = 7e-5
    verdict = judge(metrics)
    assert verdict.verdict == AMBIGUOUS
    assert verdict.exit_status == 0
    assert "replay removes it" in verdict.reasons[0]


@pytest.mark.parametrize(
    ("part", "figure", "value", "said"),
    [
        ("comparison", "sums_differing", 1, "integer sums"),
        ("comparison", "operator_mismatches", 1, "outputs of the operators"),
        ("comparison", "codes_differing", 51, "over 50 per million"),
        ("comparison", "max_code_step", 2, "no tie"),
        ("comparison", "max_tie_distance", 2e-3, "from a tie"),
        ("comparison", "sums", 0, "no integer sum"),
        ("replayed", "equal", 99, "1 of 100 answers"),
        ("replayed", "logits_max_abs_diff", 1.1e-4, "logits differ"),
        ("replayed", "logits_max_abs_diff", float("nan"), "logits differ"),
        ("replayed_drift", "mean", 0.1, "memory drifts"),
        ("replayed_drift", "forgotten", 0.2, "forgetting differs"),
        ("free", "top1_equal", 994, "below 0.995"),
    ],
)
def test_each_bar_alone_fails(part: str, figure: str, value: float, said: str) -> None:
    metrics = right_everywhere()
    setattr(getattr(metrics, part), figure, value)
    verdict = judge(metrics)
    assert verdict.verdict == FAIL
    assert verdict.exit_status == 1
    assert any(said in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("part", "figure", "value"),
    [
        ("comparison", "codes_differing", 50),
        ("comparison", "max_code_step", 1),
        ("comparison", "max_tie_distance", 1e-3),
        ("replayed", "logits_max_abs_diff", 1e-4),
        ("free", "top1_equal", 995),
    ],
)
def test_each_bar_is_reached_without_failing(part: str, figure: str, value: float) -> None:
    metrics = right_everywhere()
    setattr(getattr(metrics, part), figure, value)
    assert judge(metrics).verdict != FAIL


def test_without_replay_equal_models_pass_and_a_difference_stays_unexplained() -> None:
    metrics = Metrics(
        free=Agreement(samples=5, equal=5, positions=9, top1_equal=9), replay_unavailable="closed"
    )
    assert judge(metrics).verdict == PASS
    metrics.free.logits_max_abs_diff = 0.01
    assert judge(metrics).verdict == FAIL


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((0.0, -0.02, 0.02), PASS), ((-0.04, -0.08, 0.0), AMBIGUOUS), ((-0.2, -0.3, -0.1), FAIL)],
)
def test_a_narrower_storage_is_judged_by_the_answers_it_loses(interval, verdict: str) -> None:
    metrics = Metrics(free=Agreement(logits_max_abs_diff=3.0))
    assert judge_precision(metrics, Interval(*interval)).verdict == verdict


def test_logits_that_are_no_numbers_fail_between_precisions_too() -> None:
    metrics = Metrics(free=Agreement(logits_max_abs_diff=float("inf")))
    assert judge_precision(metrics, Interval(0.0, 0.0, 0.0)).verdict == FAIL


def test_codes_are_counted_with_their_step_and_their_distance_from_a_tie() -> None:
    comparison = Comparison()
    # Peak 127: the factor is 1, so each value is its own code before rounding.
    x = np.array([[127.0, 0.5, 3.25, -1.5], [127.0, 2.0, 2.0, 2.0]], np.float32)
    equal = comparison.compare_codes("layer", x, np.array([[127, 1, 3, -2], [127, 2, 2, 2]], np.int8))
    assert equal.tolist() == [False, True]
    assert (comparison.codes, comparison.codes_differing, comparison.max_code_step) == (8, 1, 1)
    assert comparison.max_tie_distance == 0.0
    comparison.compare_codes("layer", x[:1], np.array([[127, 0, 6, -2]], np.int8))
    assert (comparison.codes, comparison.codes_differing, comparison.max_code_step) == (12, 2, 3)
    assert comparison.max_tie_distance == 0.25
    assert comparison.differing_by_layer == {"layer": 2}


def test_sums_of_rows_at_the_floor_are_left_out_and_counted() -> None:
    comparison = Comparison()
    x = np.array([[1.0, 0.0], [1e-7, 0.0]], np.float32)
    sums = np.array([[3.0], [5.0]], np.float32)
    comparison.compare_sums(sums, np.array([[3.0], [9.0]], np.float32), floor_rows(x))
    assert (comparison.sums, comparison.sums_differing, comparison.rows_at_floor) == (1, 0, 1)


def test_a_replay_that_asks_for_more_than_was_recorded_diverges() -> None:
    tape = Tape()
    tape.add("layer", np.zeros((1, 4)), np.zeros((1, 2)))
    assert tape.take("layer", (1, 4)).codes.dtype == np.int8
    assert tape.left == 0
    with pytest.raises(Diverged):
        tape.take("layer", (1, 4))
    tape.add("layer", np.zeros((1, 4)), np.zeros((1, 2)))
    with pytest.raises(Diverged):
        tape.take("layer", (2, 4))


def test_agreement_counts_answers_positions_and_divergence() -> None:
    agreement = Agreement()
    logits = np.array([[2.0, 0.0], [0.0, 2.0]], np.float32)
    first, second = Answer([0, 1], logits, "a b"), Answer([0, 0], logits[:, ::-1], "a a")
    agreement.add_answers("same", first, first)
    agreement.add_answers("other", first, second)
    agreement.add_logits(logits, np.array([[2.0, 0.0], [2.0, 0.0]], np.float32))
    assert (agreement.greedy_match, agreement.top1_agreement) == (0.5, 0.5)
    assert agreement.changed == ["other"]
    assert agreement.logits_max_abs_diff == 2.0
    # Logits 2 apart and swapped: (2 p - 1) * 2 with p = e^2 / (1 + e^2); the first position adds nothing.
    p = np.exp(2) / (1 + np.exp(2))
    assert agreement.kl_mean == pytest.approx((2 * p - 1) * 2 / 2)


def test_scores_are_kept_by_kind_of_question() -> None:
    scores = Scores()
    nothing = np.zeros((1, 2), np.float32)
    scores.add("caption", "red heart", Answer([0], nothing, "red heart"), Answer([0], nothing, "heart"))
    scores.add("what", "ant", Answer([0], nothing, "bee"), Answer([0], nothing, "ant"))
    assert scores.by_kind() == {
        "caption": {"samples": 1, "reference": 1.0, "candidate": 0.0},
        "what": {"samples": 1, "reference": 0.0, "candidate": 1.0},
    }
