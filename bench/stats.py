"""Statistics of timings and of logits: medians, percentiles, bootstrap intervals, divergences. numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
"""Bootstrap resamples: the ends of a 95 % interval are the 50th values from each side."""


class Interval(NamedTuple):
    """A point estimate and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def median(values: Sequence[float]) -> float:
    return float(np.median(np.asarray(values, np.float64)))


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between order statistics (type 7 of Hyndman & Fan 1996)."""
    return float(np.percentile(np.asarray(values, np.float64), percent))


def summarise(values_ms: Sequence[float]) -> dict[str, float | int]:
    """Summary of one phase for a report: median, p90, minimum and count, in milliseconds."""
    return {
        "median_ms": round(median(values_ms), 4),
        "p90_ms": round(percentile(values_ms, 90), 4),
        "min_ms": round(float(min(values_ms)), 4),
        "repeats": len(values_ms),
    }


def bootstrap(
    statistic: Callable[[np.ndarray], float], rows: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap of `statistic` over `rows` [n, ...], resampled by row (Efron 1979)."""
    generator = np.random.default_rng(seed)
    draws = [statistic(rows[generator.integers(0, len(rows), len(rows))]) for _ in range(resamples)]
    low, high = np.percentile(draws, (2.5, 97.5))
    return Interval(float(statistic(rows)), float(low), float(high))


def ratio_of_medians(numerator: Sequence[float], denominator: Sequence[float], seed: int = 0) -> Interval:
    """median(a) / median(b) with rounds resampled in pairs, so that a drift within a round cancels."""
    pairs = np.stack([np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)], 1)
    return bootstrap(lambda rows: float(np.median(rows[:, 0]) / np.median(rows[:, 1])), pairs, seed)


def paired_difference(first: Sequence[bool], second: Sequence[bool], seed: int = 0) -> Interval:
    """mean(first) - mean(second) over the same samples, with its interval: samples are resampled in pairs."""
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return bootstrap(lambda rows: float(rows.mean()), difference, seed)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[..., V] -> float64 log-probabilities."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl_divergence(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL(reference || candidate) in nats of two sets of logits [..., V] -> float64 [...]. Never below 0."""
    p, q = log_softmax(reference), log_softmax(candidate)
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)


def max_abs(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference; infinite where either is not a number."""
    if a.size == 0:
        return 0.0
    difference = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
    return difference if np.isfinite(difference) else float("inf")


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): honest near 0 and 1, where a normal interval has no width."""
    z, share = 1.959964, successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * ((share * (1 - share) + z * z / (4 * trials)) / trials) ** 0.5 / (1 + z * z / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def equal_error_rate(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """(area under the ROC curve, equal error rate) of scores that should be high for `positive`.

    The area is the chance that a positive scores above a negative, equals counted half (Mann-Whitney). The rate is the
    mean of both errors at the threshold where they are nearest.
    """
    above = (positive[:, None] > negative).mean() + 0.5 * (positive[:, None] == negative).mean()
    thresholds = np.unique(np.concatenate([positive, negative]))
    thresholds = np.append(thresholds, thresholds[-1] + 1)
    missed = (positive[:, None] < thresholds).mean(0)
    alarms = (negative[:, None] >= thresholds).mean(0)
    at = np.abs(missed - alarms).argmin()
    return float(above), float((missed[at] + alarms[at]) / 2)
