"""Statistics of a `captions` stage: attention to the prefix, its drift, and how evenly its codes are spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from microvlm.bench.attention.attention_measures import divergence, prefix_measures
from microvlm.bench.attention.epps_pulley import LEAST_PAIRS, isotropy, swap_test

SLICES, NULL_DRAWS = 64, 199
"""Of an evaluation, which must be cheap: the null is drawn once a run, in under a second."""


def attention_metrics(weights: Tensor, prefix: str = "attention/") -> dict[str, float]:
    """Descriptive statistics of attention [n, k] to prefix embeddings, means over rows; see `names.MEANINGS`."""
    measures = prefix_measures(weights.cpu().numpy())._asdict()
    return {f"{prefix}{name}": float(values.mean()) for name, values in measures.items()}


def attention_divergence(before: Tensor, after: Tensor) -> float:
    """Mean Jensen-Shannon divergence between rows of two attention matrices [n, k] -> nats, 0 to ln 2."""
    return float(divergence(before.cpu().numpy(), after.cpu().numpy()).mean())


def mean_by_picture(weights: Sequence[Tensor]) -> Tensor:
    """Attention [T, k] of each of n pictures, mean over its text tokens -> [n, k]."""
    return torch.stack([part.mean(0) for part in weights]).cpu()


def drift_p_value(before: Tensor, after: Tensor) -> float | None:
    """p-value of the drift between attention [n, k] of the same n pictures, by swaps; None for too few pictures."""
    first, second = before.cpu().numpy(), after.cpu().numpy()
    if len(first) < LEAST_PAIRS or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return None
    return swap_test([(first, second)], slices=SLICES)[0].p_value


def isotropy_metrics(features: Mapping[str, Tensor]) -> dict[str, float]:
    """The statistic of LeJEPA and its p-value for features [n, d] by metric name; nothing of one row or of NaN."""
    values: dict[str, float] = {}
    for name, rows in features.items():
        array = rows.float().cpu().numpy()
        if len(array) > 1 and np.isfinite(array).all():
            test = isotropy(array, SLICES, NULL_DRAWS)
            values |= {name: test.statistic, f"{name}_p": test.p_value}
    return values
