"""Confidence that the entry a reading points at answers the question: a logistic regression on the reading's evidence.

Knows no memory; `evidence` computes the numbers, `microvlm-bench memory --fit-pointing` fits the weights.
"""

from __future__ import annotations

import numpy as np

from microvlm.configuration.pointing import EVIDENCE, PointingWeights


def confidence_of(evidence: np.ndarray, weights: PointingWeights) -> np.ndarray:
    """Probability that the entry answers the question: evidence [..., len(EVIDENCE)] -> float64 [...]."""
    values = np.array([getattr(weights, name) for name in EVIDENCE])
    return 1 / (1 + np.exp(-np.clip(evidence @ values + weights.constant, -60, 60)))
