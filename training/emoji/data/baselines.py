"""Baselines for captions: the nearest class mean of raw pixels and of a network's features.

Means are fitted on plain views of the TRAIN vendors and scored on the test and the stress vendor, on exactly the
committed test emoji. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from microvlm.training.emoji.data.drawing_sources import STRESS_VENDOR, TEST_VENDOR, TRAIN_VENDORS
from microvlm.training.emoji.data.emoji import EmojiData, read_test_emoji
from microvlm.training.emoji.data.views import plain_emoji
from microvlm.training.emoji.teacher import TEACHER_SIZE, load_teacher, pooled_features

PIXELS_SIDE = 24
_BATCH = 32

Features = Callable[[torch.Tensor], np.ndarray]
"""uint8 RGBA [B, H, W, 4] -> float32 [B, D]."""


def pixel_features(rgba: torch.Tensor) -> np.ndarray:
    """The plain view averaged to 24 x 24 pixels: float32 [B, 1728]."""
    return F.interpolate(plain_emoji(rgba), size=PIXELS_SIDE, mode="area").flatten(1).numpy()


def teacher_feature_function(model: torch.nn.Module) -> Features:
    """A function that gives the teacher's pooled features, scaled to length 1: float32 [B, 1280]."""

    def features(rgba: torch.Tensor) -> np.ndarray:
        pooled = pooled_features(model, plain_emoji(rgba, TEACHER_SIZE))
        return F.normalize(pooled, dim=1).numpy()

    return features


def _vendor_features(emoji: EmojiData, vendor: str, rows: np.ndarray, features: Features) -> np.ndarray:
    images = emoji.images(vendor)
    parts = [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
    return np.concatenate([features(torch.from_numpy(np.array(images[part]))) for part in parts])


def nearest_class_mean(emoji: EmojiData, features: Features) -> dict[str, float]:
    """Share of the test emoji whose nearest class mean is their own, for each scored vendor."""
    rows = np.array([emoji.index(code) for code, _ in read_test_emoji()])
    total: np.ndarray | None = None
    count = np.zeros(len(rows))
    for vendor in TRAIN_VENDORS:
        drawn = np.flatnonzero(emoji.present(vendor)[rows])
        values = _vendor_features(emoji, vendor, rows[drawn], features)
        if total is None:
            total = np.zeros((len(rows), values.shape[1]))
        total[drawn] += values
        count[drawn] += 1
    assert total is not None
    means = total / count[:, None]
    scores = {}
    for vendor in (TEST_VENDOR, STRESS_VENDOR):
        values = _vendor_features(emoji, vendor, rows, features).astype(np.float64)
        distance = (means**2).sum(1) - 2 * values @ means.T
        scores[vendor] = float((distance.argmin(1) == np.arange(len(rows))).mean())
    return scores


def run_baselines(emoji: EmojiData, teacher: bool = True) -> dict:
    """Scores of all baselines, as --json prints them; `teacher` includes the network, which takes minutes."""
    result: dict = {
        "classes": len(read_test_emoji()),
        "fitted_on": list(TRAIN_VENDORS),
        "pixels_24": nearest_class_mean(emoji, pixel_features),
    }
    if teacher:
        result["efficientnet_lite0"] = nearest_class_mean(emoji, teacher_feature_function(load_teacher()))
    return result
