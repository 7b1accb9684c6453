"""Counts of differing activations, and the verdict that figures give."""

from __future__ import annotations

import numpy as np
import pytest

from microvlm.bench.equivalence.metrics import Agreement, Drift, Metrics, Scores
from microvlm.bench.equivalence.transcripts import Answer
from microvlm.bench.equivalence.verdict import AMBIGUOUS, FAIL, PASS, judge, judge_precision
from microvlm.bench.stats import Interval
from microvlm.exporters.replay.differences import Differences, rows_above_floor
from microvlm.exporters.replay.recording import Diverged, RecordedCall, Recording


def right_everywhere() -> Metrics:
    """A million activations compared, 1,000 positions, nothing different."""
    differences = Differences(activations=1_000_000, sums=500_000, operator_outputs=500_000)
    agreements = [Agreement(samples=100, equal=100, positions=1000, top1_equal=1000) for _ in range(2)]
    return Metrics(
        free=agreements[0], replayed=agreements[1], differences=differences, replayed_drift=Drift()
    )


def test_no_difference_is_a_pass() -> None:
    assert judge(right_everywhere()).verdict == PASS


def test_a_difference_that_replay_removes_is_ambiguous_and_no_failure() -> None:
    metrics = right_everywhere()
    metrics.free.equal, metrics.free.top1_equal, metrics.free.logits_max_abs_diff = 97, 997, 0.28
    metrics.differences.activations_differing, metrics.differences.max_step = 6, 1
    metrics.differences.max_tie_distance = 7e-5
    verdict = judge(metrics)
    assert verdict.verdict == AMBIGUOUS
    assert verdict.exit_status == 0
    assert "replay removes it" in verdict.reasons[0]


@pytest.mark.parametrize(
    ("part", "figure", "value", "reason_part"),
    [
        ("differences", "sums_differing", 1, "integer sums"),
        ("differences", "operator_mismatches", 1, "outputs of the operators"),
        ("differences", "activations_differing", 51, "over 50 per million"),
        ("differences", "max_step", 2, "not a tie"),
        ("differences", "max_tie_distance", 2e-3, "from a tie"),
        ("differences", "sums", 0, "no integer sum"),
        ("replayed", "equal", 99, "1 of 100 answers"),
        ("replayed", "logits_max_abs_diff", 1.1e-4, "logits differ"),
        ("replayed", "logits_max_abs_diff", float("nan"), "logits differ"),
        ("replayed_drift", "mean", 0.1, "memory drifts"),
        ("replayed_drift", "forgotten", 0.2, "forgetting differs"),
        ("free", "top1_equal", 994, "below 0.995"),
    ],
)
def test_each_bar_alone_fails(part: str, figure: str, value: float, reason_part: str) -> None:
    metrics = right_everywhere()
    setattr(getattr(metrics, part), figure, value)
    verdict = judge(metrics)
    assert verdict.verdict == FAIL
    assert verdict.exit_status == 1
    assert any(reason_part in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("part", "figure", "value"),
    [
        ("differences", "activations_differing", 50),
        ("differences", "max_step", 1),
        ("differences", "max_tie_distance", 1e-3),
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


def test_activations_are_counted_with_their_step_and_their_distance_from_a_tie() -> None:
    differences = Differences()
    # Peak 127: the factor is 1, so each value is its own int8 activation before rounding.
    x = np.array([[127.0, 0.5, 3.25, -1.5], [127.0, 2.0, 2.0, 2.0]], np.float32)
    equal = differences.compare_activations("layer", x, np.array([[127, 1, 3, -2], [127, 2, 2, 2]], np.int8))
    assert equal.tolist() == [False, True]
    assert (differences.activations, differences.activations_differing, differences.max_step) == (8, 1, 1)
    assert differences.max_tie_distance == 0.0
    differences.compare_activations("layer", x[:1], np.array([[127, 0, 6, -2]], np.int8))
    assert (differences.activations, differences.activations_differing, differences.max_step) == (12, 2, 3)
    assert differences.max_tie_distance == 0.25
    assert differences.differing_by_layer == {"layer": 2}


def test_only_single_steps_beside_a_tie_are_rounding_ties() -> None:
    differences = Differences()
    x = np.array([[127.0, 1.4999, 2.2, -3.5001]], np.float32)
    differences.compare_activations("layer", x, np.array([[127, 2, 2, -3]], np.int8))
    assert (differences.activations, differences.activations_differing, differences.max_step) == (4, 2, 1)
    assert differences.max_tie_distance == pytest.approx(1e-4, rel=0.01)
    assert differences.only_ties
    differences.compare_activations("layer", x, np.array([[127, 1, 3, -4]], np.int8))
    assert not differences.only_ties


def test_sums_of_rows_at_the_floor_are_left_out_and_counted() -> None:
    differences = Differences()
    x = np.array([[1.0, 0.0], [1e-7, 0.0]], np.float32)
    sums = np.array([[3.0], [5.0]], np.float32)
    differences.compare_sums(sums, np.array([[3.0], [9.0]], np.float32), rows_above_floor(x))
    assert (differences.sums, differences.sums_differing, differences.rows_at_floor) == (1, 0, 1)


def test_a_replay_that_asks_for_more_than_was_recorded_diverges() -> None:
    recording = Recording()
    call = RecordedCall(np.zeros((1, 4), np.int8), np.zeros((1, 2), np.float32))
    recording.add("layer", call)
    assert recording.take("layer", (1, 4)) == call
    assert recording.unused_calls == 0
    with pytest.raises(Diverged):
        recording.take("layer", (1, 4))
    recording.add("layer", call)
    with pytest.raises(Diverged):
        recording.take("layer", (2, 4))


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
