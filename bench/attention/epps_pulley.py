"""The sliced Epps-Pulley statistic of LeJEPA: one sample against its isotropic null, and two samples by swapping pairs.

Knows numbers alone, no model. Sources: Epps and Pulley 1983 (Biometrika 70, 723-726) for the statistic of one
projection; Balestriero and LeCun 2025 (LeJEPA, arXiv 2511.08544) for random slices and the points.

Normalisation. Of N projections x on one unit direction

    T = N * integral of |mean(e^(itx)) - e^(-t^2/2)|^2 e^(-t^2/2) dt  over -3 <= t <= 3

by the trapezoid rule on 17 points of 0..3, doubled by symmetry. Where the x are independent and standard normal, E[T]
is the same for every N, because the mean of |...|^2 is (1 - e^(-t^2)) / N. `one_slice_null` gives it, and the quantiles
of one slice. A test averages T over many slices. These are nearly independent in many dimensions, so the quantiles of
the average lie far below those of one slice, and depend on N and the width: `isotropy` draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from microvlm.bench.stats import wilson

SLICES = 256
NULL_DRAWS = 999
SWAPS = 9999
LEAST_PAIRS = 6
"""Of n pairs no p-value can be below 2^(1-n), because swapping all of them changes nothing: with 5 not below .05."""
_POINTS = np.linspace(0.0, 3.0, 17)
_NORMAL = np.exp(-(_POINTS**2) / 2)
"""Characteristic function of the standard normal distribution, and the weight of the integral."""
# Both signs of t, so every point counts twice but the first, which the rule halves again and where the gap is 0.
_WEIGHTS = 2 * (_POINTS[1] - _POINTS[0]) * np.where(np.arange(17) == 16, 0.5, 1.0) * _NORMAL
_EQUAL = 1e-6
"""Attention weights are float32 in 0..1: what differs less than this everywhere is the same up to rounding."""
_TIE = 1e-9


class SliceNull(NamedTuple):
    """Mean and quantiles of the statistic of one slice under its null, for large N."""

    mean: float
    quantile_95: float
    quantile_99: float


class IsotropyTest(NamedTuple):
    """Mean of T over slices, and its null for as many samples of the same width."""

    statistic: float
    null_mean: float
    null_95: float
    null_99: float
    p_value: float
    """(1 + draws of the null that are as large) / (1 + draws): never 0."""
    p_interval: tuple[float, float]
    """95 % interval of the p-value that endless draws would give (Wilson)."""


class SwapTest(NamedTuple):
    """Two-sample statistic of pairs, and its p-value among random swaps within pairs."""

    statistic: float
    null_mean: float
    """Its mean over all swaps."""
    p_value: float
    p_interval: tuple[float, float]


def epps_pulley(x: np.ndarray) -> np.ndarray:
    """T of each column of standardised projections [N, M] -> float64 [M]."""
    # e^(itx) at equally spaced t are powers of one number. In float32, and by cos and sin, this is ten times faster.
    angle = np.asarray(_POINTS[1] * x, np.float32)
    step = np.empty(angle.shape, np.complex64)
    step.real, step.imag = np.cos(angle), np.sin(angle)
    power = step.copy()
    total = np.zeros(angle.shape[1])
    for weight, normal in zip(_WEIGHTS[1:], _NORMAL[1:], strict=True):
        gap = power.mean(0) - normal
        total += weight * (gap.real**2 + gap.imag**2)
        power *= step
    return len(x) * total


def one_slice_null(draws: int = 200_000, seed: int = 0) -> SliceNull:
    """The null of one slice for large N: T is a sum of chi-squares, whose factors are the eigenvalues of a covariance.

    The gap at t is a Gaussian process then, with real and imaginary part independent (Epps and Pulley 1983). The mean
    is exact, for every N; the quantiles are those of `draws` draws of the sum.
    """
    s, t = _POINTS[:, None], _POINTS[None, :]
    near, far, both = np.exp(-((s - t) ** 2) / 2), np.exp(-((s + t) ** 2) / 2), np.exp(-(s**2 + t**2) / 2)
    root = np.sqrt(_WEIGHTS)
    factors = np.concatenate(
        [
            np.linalg.eigvalsh(root[:, None] * part * root)
            for part in ((near + far) / 2 - both, (near - far) / 2)
        ]
    )
    factors = factors[factors > 1e-12]
    sums = np.random.default_rng(seed).standard_normal((draws, len(factors))) ** 2 @ factors
    low, high = np.quantile(sums, (0.95, 0.99))
    return SliceNull(float((_WEIGHTS * (1 - _NORMAL**2)).sum()), float(low), float(high))


def isotropy(
    features: np.ndarray, slices: int = SLICES, draws: int = NULL_DRAWS, seed: int = 0
) -> IsotropyTest:
    """Test whether the directions of features [N, d] are spread evenly, as LeJEPA wants codes to be.

    Rows are brought to length sqrt(d), so that a projection has variance 1; only their directions count, as in cosines.
    The null is N independent uniform directions of d dimensions with the same slices, so the test is exact for every N
    and d. Large values are far from it: a common direction, few dimensions, or clusters.

    Raises ValueError for less than two rows, and for numbers that are not finite.
    """
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2 or len(rows) < 2 or not np.isfinite(rows).all():
        raise ValueError(f"finite features [2 or more, d] expected, not {list(rows.shape)}")
    count, width = rows.shape
    statistic = _mean_over_slices(rows, directions(width, slices, seed))
    null = isotropic_null(count, width, slices, draws, seed)
    above = int((null >= statistic).sum())
    low, high = np.quantile(null, (0.95, 0.99))
    return IsotropyTest(
        statistic,
        float(null.mean()),
        float(low),
        float(high),
        (1 + above) / (1 + draws),
        wilson(above, draws),
    )


@lru_cache(maxsize=16)
def isotropic_null(count: int, width: int, slices: int, draws: int, seed: int) -> np.ndarray:
    """The statistic of `isotropy` for `draws` sets of `count` uniform directions -> float64 [draws], ascending."""
    fixed = directions(width, slices, seed).astype(np.float32)
    generator = np.random.default_rng([seed, count, width])
    values = [
        _mean_over_slices(generator.standard_normal((count, width), np.float32), fixed) for _ in range(draws)
    ]
    null = np.sort(values)
    null.flags.writeable = False
    return null


def directions(width: int, slices: int, seed: int) -> np.ndarray:
    """Random unit directions -> float64 [width, slices]."""
    columns = np.random.default_rng(seed).standard_normal((width, slices))
    return columns / np.linalg.norm(columns, axis=0)


def _mean_over_slices(rows: np.ndarray, fixed: np.ndarray) -> float:
    """Mean T of rows [N, d], brought to length sqrt(d), over the directions [d, slices]."""
    lengths = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return float(epps_pulley(rows / lengths * rows.shape[1] ** 0.5 @ fixed).mean())


def swap_test(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    slices: int = SLICES,
    swaps: int = SWAPS,
    seed: int = 0,
) -> tuple[SwapTest, list[SwapTest]]:
    """Test whether two models give the same features to the same n pictures: (over all parts, each part).

    pairs : for each part (a layer) the features [n, d] of both models; row i of both is picture i.

    The statistic of a part is N / 2 * integral of |mean(e^(itx)) - mean(e^(ity))|^2 e^(-t^2/2) dt, averaged over random
    slices, each standardised by mean and deviation of both samples together. Under the null the two features of a
    picture may be swapped, so the p-value is the share of random swaps within pairs that give as much. Swapping within
    pairs keeps the pictures' own differences out of the null. Over all parts: the mean of their statistics, for
    the same swaps.

    Raises ValueError for less than LEAST_PAIRS pictures, other shapes, and for numbers that are not finite.
    """
    grams = np.stack([_gram(first, second, slices, seed) for first, second in pairs])
    count = grams.shape[1]
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (swaps, count))
    null = np.stack([((signs @ gram) * signs).sum(1) for gram in grams]) / (2 * count)
    found = grams.sum((1, 2)) / (2 * count)
    means = np.trace(grams, axis1=1, axis2=2) / (2 * count)
    parts = [_swap_test(*part) for part in zip(found, means, null, strict=True)]
    return _swap_test(found.mean(), means.mean(), null.mean(0)), parts


def _swap_test(found: float, mean: float, null: np.ndarray) -> SwapTest:
    # No less than rounding below: a swap of no pair, or of all, must count as equal.
    above = int((null >= found * (1 - _TIE)).sum())
    return SwapTest(float(found), float(mean), (1 + above) / (1 + len(null)), wilson(above, len(null)))


def _gram(first: np.ndarray, second: np.ndarray, slices: int, seed: int) -> np.ndarray:
    """G [n, n] such that s' G s / 2n is the statistic after swapping the pairs with sign -1 in s."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 2 or a.shape != b.shape or len(a) < LEAST_PAIRS:
        raise ValueError(
            f"two times [{LEAST_PAIRS} or more, d] expected, not {list(a.shape)} and {list(b.shape)}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features must be finite")
    gram = np.zeros((len(a), len(a)))
    if np.abs(a - b).max() <= _EQUAL:
        return gram
    centre = (a.mean(0) + b.mean(0)) / 2
    fixed = directions(a.shape[1], slices, seed)
    x, y = (a - centre) @ fixed, (b - centre) @ fixed
    deviation = np.sqrt(((x**2).mean(0) + (y**2).mean(0)) / 2)
    scale = np.where(deviation > 0, 1 / np.maximum(deviation, 1e-300), 0.0)
    steps = [np.exp(1j * _POINTS[1] * part * scale) for part in (x, y)]
    powers = [np.ones_like(step) for step in steps]
    for weight in _WEIGHTS[1:]:
        powers = [power * step for power, step in zip(powers, steps, strict=True)]
        gap = powers[0] - powers[1]
        gram += weight / slices * (gap.real @ gap.real.T + gap.imag @ gap.imag.T)
    return gram


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that hold for all tests together (Holm 1979), in the given order."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.minimum(np.maximum.accumulate(np.asarray(p_values)[order] * factors), 1.0)
    result = np.empty(len(p_values))
    result[order] = adjusted
    return [float(value) for value in result]
