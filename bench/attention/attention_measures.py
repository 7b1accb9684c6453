"""Descriptive statistics of attention to the prefix embeddings, and of how few directions codes use. numpy only.

The trackers of a training run and `microvlm-bench attention` take their numbers from here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SPARSE = 0.1
"""A weight below this share of an even one counts as none."""
_TINY = 1e-12


class PrefixMeasures(NamedTuple):
    """Statistics of rows of attention to k prefix embeddings; each array has the rows' leading shape."""

    mean: np.ndarray
    """Attention to all prefix embeddings together, 0 to 1."""
    max: np.ndarray
    """Attention to the prefix embedding that gets most, 0 to 1."""
    entropy: np.ndarray
    """Entropy of the attention over the prefix embeddings, as shares of `mean`: nats, 0 to ln k."""
    sparsity: np.ndarray
    """Share of the k weights that are below SPARSE of an even one, 0 to 1."""


def prefix_measures(weights: np.ndarray) -> PrefixMeasures:
    """Measure every row of attention weights [..., k] to the prefix embeddings."""
    wide = np.asarray(weights, np.float64)
    total = wide.sum(-1)
    shares = wide / np.maximum(total, _TINY)[..., None]
    entropy = -(shares * np.log(np.maximum(shares, _TINY))).sum(-1)
    sparsity = (shares < SPARSE / wide.shape[-1]).mean(-1)
    return PrefixMeasures(total, wide.max(-1), entropy, sparsity)


def divergence(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of rows of attention [..., k], as shares of their sums -> nats [...], 0 to ln 2."""
    p, q = (
        wide / np.maximum(wide.sum(-1, keepdims=True), _TINY)
        for wide in (np.asarray(part, np.float64) for part in (first, second))
    )
    middle = np.maximum((p + q) / 2, _TINY)
    halves = [(part * np.log(np.maximum(part, _TINY) / middle)).sum(-1) for part in (p, q)]
    result: np.ndarray = np.maximum(0.5 * (halves[0] + halves[1]), 0.0)
    return result


def mean_length(features: np.ndarray) -> float:
    """Length of the mean of the directions of features [N, d]: 1 where all are one, about 1 / sqrt(N) where even."""
    return float(np.linalg.norm(_unit(features).mean(0)))


def effective_rank(features: np.ndarray) -> float:
    """exp of the entropy of the directions' uncentred spectrum, 1 to min(N, d) (Roy and Vetterli 2007)."""
    energy = np.linalg.svd(_unit(features), compute_uv=False) ** 2
    shares = energy / max(energy.sum(), _TINY)
    return float(np.exp(-(shares * np.log(np.maximum(shares, _TINY))).sum()))


def _unit(features: np.ndarray) -> np.ndarray:
    wide = np.asarray(features, np.float64)
    unit: np.ndarray = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), _TINY)
    return unit
