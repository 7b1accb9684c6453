"""Averages the metrics of steps and their speed, and measures the memory that steps take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from microvlm.training.watching import names

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"
"""Linux, proc(5): resets VmHWM, the peak of the resident set, to its present size."""


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


class StepMemory:
    """The largest memory of this process within steps: on a GPU what PyTorch has allocated, else the resident set."""

    largest: ClassVar[dict[bool, int]] = {False: 0, True: 0}
    """Largest memory of this process at a reset, which makes the system forget it: False of the resident set, True of
    the GPU's."""

    def __init__(self, device: torch.device):
        self.is_gpu = device.type == "cuda"
        self.peak_bytes: int | None = None
        """None where the system does not say."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step; what is allocated between two steps counts only as far as it is still there."""
        self._reset()
        yield
        peak = self._peak()
        if peak is not None:
            self.peak_bytes = max(peak, self.peak_bytes or 0)

    def _reset(self) -> None:
        self.largest[self.is_gpu] = max(self.largest[self.is_gpu], self._peak() or 0)
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError):
            _CLEAR.write_text(_RESET_PEAK)

    def _peak(self) -> int | None:
        if self.is_gpu:
            return torch.cuda.max_memory_allocated()
        try:
            lines = _STATUS.read_text().splitlines()
        except OSError:
            return None
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def _metric_name(key: str) -> str:
    return key if "/" in key else f"train/{key}"
