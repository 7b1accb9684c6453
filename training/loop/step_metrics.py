"""Averages the metrics of steps, and their speed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microvlm.training.watching import names


class StepMetrics:
    """Averages the metrics of `every` steps."""

    def __init__(self, every: int):
        self.every, self.count = every, 0
        # Sums stay on the device: fetching a number each step would make the device wait.
        self.sums: dict[str, Tensor] = {}
        self.samples = self.tokens = 0
        self.seconds = 0.0

    def add(self, metrics: dict[str, Any], samples: int, tokens: int, seconds: float) -> None:
        """Add a step's metrics. seconds : of waiting for its batch and of the step alone."""
        for key, value in metrics.items():
            self.sums[key] = self.sums.get(key, 0.0) + torch.as_tensor(value).detach()
        self.count += 1
        self.samples += samples
        self.tokens += tokens
        self.seconds += seconds

    def take(self) -> dict[str, float]:
        """The means since the last call, and the rates of samples and tokens."""
        seconds = max(1e-9, self.seconds)
        row = {_metric_name(key): round(float(value) / self.count, 6) for key, value in self.sums.items()}
        row |= {
            names.STEP_SECONDS: round(seconds / self.count, 4),
            names.SAMPLES_PER_SECOND: round(self.samples / seconds, 3),
            names.TOKENS_PER_SECOND: round(self.tokens / seconds, 2),
        }
        self.sums, self.count, self.samples, self.tokens, self.seconds = {}, 0, 0, 0, 0.0
        return row


def _metric_name(key: str) -> str:
    return key if "/" in key else f"train/{key}"
