"""Confidence that the entry a reading points at answers the question: logistic regressions on the reading's evidence.

Of a query with a picture, one says whether the entry is about that picture, and one whether it answers that question:
each has a threshold, and the confidence is the product. One regression for both took similar questions about a picture
for evidence against the picture. Knows no memory; `evidence` computes the numbers, `microvlm-bench memory
--fit-pointing` fits the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from microvlm.configuration.pointing import EVIDENCE, PointingConfig, PointingMap, PointingWeights


class Judged(NamedTuple):
    """How surely readings point at their entries."""

    confidence: np.ndarray
    """Probability that the entry answers the query, float64 [...]."""
    is_clear: np.ndarray
    """Whether every probability reaches its threshold, bool [...]."""


def judge_readings(evidence: np.ndarray, has_picture: np.ndarray, pointing: PointingConfig) -> Judged:
    """Judge readings: evidence [..., len(EVIDENCE)], whether their queries have a picture, bool [...]."""
    if pointing.same_picture is None or pointing.same_question is None:
        return _judged(evidence, [pointing])
    without = _judged(evidence, [pointing])
    pictured = _judged(evidence, [pointing.same_picture, pointing.same_question])
    return Judged(*(np.where(has_picture, *pair) for pair in zip(pictured, without, strict=True)))


def _judged(evidence: np.ndarray, maps: list[PointingMap]) -> Judged:
    confidence, is_clear = np.ones(evidence.shape[:-1]), np.ones(evidence.shape[:-1], bool)
    for each in maps:
        probability = probability_of(evidence, each.weights)
        confidence, is_clear = confidence * probability, is_clear & (probability >= each.threshold)
    return Judged(confidence, is_clear)


def probability_of(evidence: np.ndarray, weights: PointingWeights) -> np.ndarray:
    """The probability of one regression: evidence [..., len(EVIDENCE)] -> float64 [...]."""
    values = np.array([getattr(weights, name) for name in EVIDENCE])
    return 1 / (1 + np.exp(-np.clip(evidence @ values + weights.constant, -60, 60)))
