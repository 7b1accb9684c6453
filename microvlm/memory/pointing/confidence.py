"""Confidence that the entry a reading points at answers the question: a logistic regression on the reading's evidence,
and on products of two of its numbers.

Knows no memory; `evidence` computes the numbers, `microvlm-bench memory --fit-pointing` fits the weights.
"""

from __future__ import annotations

import numpy as np

from microvlm.configuration.pointing import EVIDENCE, PointingWeights

MOST_FACTS = 256
"""Facts of the largest memories that the weights of products are fitted to."""


def confidence_of(evidence: np.ndarray, weights: PointingWeights) -> np.ndarray:
    """Probability that the entry answers the question: evidence [..., len(EVIDENCE)] -> float64 [...]."""
    values = np.array([getattr(weights, name) for name in EVIDENCE])
    if weights.products:
        # A product goes on growing where nothing was fitted.
        facts = EVIDENCE.index("log_facts")
        evidence = np.concatenate(
            [evidence[..., :facts], evidence[..., facts:].clip(max=np.log(MOST_FACTS))], -1
        )
    odds = evidence @ values + weights.constant
    if weights.products:
        odds = odds + products_of(evidence) @ np.array(weights.products)
    return 1 / (1 + np.exp(-np.clip(odds, -60, 60)))


def products_of(evidence: np.ndarray) -> np.ndarray:
    """Products of each number of the evidence [..., n] with itself and those after it -> [..., n (n + 1) / 2]."""
    first, second = np.triu_indices(evidence.shape[-1])
    return evidence[..., first] * evidence[..., second]
