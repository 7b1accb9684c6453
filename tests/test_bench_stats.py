"""Statistics of the bench against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from microvlm.bench import stats


def test_median_and_p90_of_a_ramp_are_known() -> None:
    values = list(range(11))
    assert stats.median(values) == 5
    assert stats.percentile(values, 90) == 9
    assert stats.summarise(values) == {"median_ms": 5.0, "p90_ms": 9.0, "min_ms": 0.0, "repeats": 11}


def test_kl_of_two_bernoullis_is_its_closed_form() -> None:
    p, q = 0.8, 0.3
    logits_p, logits_q = np.log([[p, 1 - p]]), np.log([[q, 1 - q]])
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert stats.kl_divergence(logits_p, logits_q)[0] == pytest.approx(expected, rel=1e-12)


def test_kl_ignores_a_constant_added_to_logits_and_large_ones_do_not_overflow() -> None:
    logits = np.array([[1000.0, 1.0, -3.0]], np.float32)
    assert stats.kl_divergence(logits, logits + 512)[0] == pytest.approx(0, abs=1e-9)


def test_log_softmax_sums_to_one_in_float64() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    assert stats.log_softmax(logits).dtype == np.float64
    assert np.allclose(np.exp(stats.log_softmax(logits)).sum(-1), 1, atol=1e-14)


def test_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(10, 2, 400)
    interval = stats.bootstrap(lambda rows: float(rows.mean()), values, seed=3)
    half_width = 1.96 * values.std() / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.value == pytest.approx(half_width, rel=0.15)
    assert interval.value - interval.low == pytest.approx(half_width, rel=0.15)


def test_a_drift_that_hits_both_backends_alike_leaves_their_ratio_certain() -> None:
    drift = 2.0 ** np.arange(20)
    interval = stats.ratio_of_medians(3 * drift, drift)
    assert interval.value == pytest.approx(3)
    assert interval.low == pytest.approx(3)
    assert interval.high == pytest.approx(3)


def test_paired_difference_of_equal_answers_is_zero_without_spread() -> None:
    right = [True, False, True, True]
    assert stats.paired_difference(right, right) == (0.0, 0.0, 0.0)
    assert stats.paired_difference([False] * 4, [True] * 4) == (-1.0, -1.0, -1.0)


def test_a_difference_that_is_no_number_is_infinite() -> None:
    ones = np.ones(3, np.float32)
    assert stats.max_abs(ones, np.array([1, np.nan, 1], np.float32)) == float("inf")
    assert stats.max_abs(ones, ones) == 0.0
    assert stats.max_abs(ones, ones + 0.5) == 0.5
