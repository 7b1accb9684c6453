"""Calibration error, risk and coverage, and separation of answers. numpy only; knows no model."""

from __future__ import annotations

from typing import Any

import numpy as np

from microvlm.bench.stats import RESAMPLES, bootstrap

BINS = 15
POINTS = 20
"""Coverages at which the curve is drawn: 1/20, 2/20, ... 1."""


def calibration_bins(confidences: np.ndarray, right: np.ndarray) -> list[dict[str, float | int]]:
    """Answers sorted by confidence in at most 15 bins of equal mass -> mean confidence and share right of each."""
    order = np.argsort(confidences, kind="stable")
    return [
        {
            "count": len(part),
            "confidence": float(confidences[part].mean()),
            "right": float(right[part].mean()),
        }
        for part in np.array_split(order, min(BINS, len(order)))
    ]


def calibration_error(confidences: np.ndarray, right: np.ndarray) -> float:
    """Mean over answers of |mean confidence - share right| of their bin (Naeini et al. 2015, with equal mass)."""
    bins = calibration_bins(confidences, right)
    return float(
        sum(part["count"] * abs(part["confidence"] - part["right"]) for part in bins) / len(confidences)
    )


def calibration_part(confidences: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """The calibration error with its bootstrap interval over answers, and the bins.

    Drawn answers are spread over bins less evenly than the answers are, which adds to the error of every draw: the
    interval is the basic one (Efron and Tibshirani 1993, section 13), which takes that off again.
    """
    rows = np.stack([confidences, right], 1).astype(np.float64)
    drawn = bootstrap(lambda drawn: calibration_error(drawn[:, 0], drawn[:, 1]), rows)
    low, high = (max(0.0, 2 * drawn.value - bound) for bound in (drawn.high, drawn.low))
    error = {**drawn._asdict(), "low": low, "high": high}
    return {"error": error, "bins": calibration_bins(confidences, right)}


def risks(sureness: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float64 [n]: share wrong of the k surest answers, k = 1 ... n. Equally sure ones share their mean."""
    order = np.argsort(-sureness, kind="stable")
    values, groups = np.unique(-sureness[order], return_inverse=True)
    means = np.zeros(len(values))
    np.add.at(means, groups, 1.0 - right[order].astype(np.float64))
    means /= np.bincount(groups)
    return np.cumsum(means[groups]) / np.arange(1, len(order) + 1)


def risk_coverage(sureness: np.ndarray, right: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """The curve of risk over coverage and the area under it (the mean risk; Geifman and El-Yaniv 2017).

    Each has a 95 % bootstrap interval over answers.
    """
    count = len(sureness)
    places = np.ceil(np.arange(1, POINTS + 1) * count / POINTS).astype(int).clip(1) - 1
    generator = np.random.default_rng(seed)
    draws = np.empty((RESAMPLES, POINTS + 1))
    for number in range(RESAMPLES):
        chosen = generator.integers(0, count, count)
        drawn = risks(sureness[chosen], right[chosen])
        draws[number] = [*drawn[places], drawn.mean()]
    low, high = np.percentile(draws, (2.5, 97.5), axis=0).tolist()
    risk = risks(sureness, right)
    curve = [
        {
            "coverage": (number + 1) / POINTS,
            "value": float(risk[place]),
            "low": low[number],
            "high": high[number],
        }
        for number, place in enumerate(places)
    ]
    return {"area": {"value": float(risk.mean()), "low": low[-1], "high": high[-1]}, "curve": curve}


def auroc(positive: np.ndarray, negative: np.ndarray) -> float | None:
    """The chance that a positive scores above a negative, equals counted half; None without either."""
    if not len(positive) or not len(negative):
        return None
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left")
    equal = np.searchsorted(ordered, positive, "right") - below
    return float((below + 0.5 * equal).mean() / len(negative))
