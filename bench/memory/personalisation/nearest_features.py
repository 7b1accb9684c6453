"""The baseline of personalisation: the nearest written picture by the encoder's own features, above a threshold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from microvlm.bench.memory.model_under_test import BATCH, ModelUnderTest
from microvlm.bench.memory.personalisation.concept_sets import Concept


class NearestFeatures:
    """Features of pictures, and names by the nearest of those that were written. Remembers nothing but features."""

    def __init__(self, model: ModelUnderTest):
        self.model = model

    def features(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Mean of each picture's prefix embeddings, of length 1: float32 [N, H]."""
        rows = []
        for start in range(0, len(pictures), BATCH):
            pixels = np.stack([self.model.processor.pixels(p) for p in pictures[start : start + BATCH]])
            rows.append(self.model.runtime.encode_image(pixels).mean(1))
        features = np.concatenate(rows)
        return features / np.maximum(
            np.linalg.norm(features, axis=1, keepdims=True), np.finfo(np.float32).tiny
        )

    def threshold(self, written: Sequence[Concept], strangers: Sequence[Concept]) -> float:
        """The cosine that gives the largest weighted accuracy on the choosing split."""
        stored = self.features([concept.written for concept in written])
        nearest, cosines = nearest_of(self.features([concept.asked for concept in written]), stored)
        right = nearest == np.arange(len(written))
        others = nearest_of(self.features([concept.asked for concept in strangers]), stored)[1]
        return best_threshold(np.where(right, cosines, -np.inf), others)


def nearest_of(queries: np.ndarray, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of the nearest stored row, its cosine) of each query, int64 [N] and float [N]; rows have length 1."""
    cosines = queries @ stored.T
    nearest = cosines.argmax(1)
    return nearest, cosines[np.arange(len(queries)), nearest]


def best_threshold(positives: np.ndarray, negatives: np.ndarray) -> float:
    """The threshold t with the largest mean of (positives >= t) and (negatives < t), the middle of its gap.

    A positive whose name is wrong counts as -inf: no threshold makes it right.
    """
    scores = np.unique(np.concatenate([positives, negatives]))
    scores = scores[np.isfinite(scores)]
    if not len(scores):
        return 0.0
    between = (scores[1:] + scores[:-1]) / 2
    candidates = np.concatenate([[scores[0] - 1e-6], between, [scores[-1] + 1e-6]])
    accuracies = (positives[:, None] >= candidates).mean(0) + (negatives[:, None] < candidates).mean(0)
    return float(candidates[accuracies.argmax()])
