"""Says whether two sides differ, from samples that were taken in turns. Knows no model and no process.

A pair is two fresh processes, one a side; rounds in it take turns. What differs from process to process (the place of
its memory, above all) is a pair's, so pairs are what is resampled: 100 rounds in one pair are one sample of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from microvlm.bench.stats import Interval, percentile

SLOWER, FASTER, SAME, UNDECIDED = "slower", "faster", "same", "undecided"
MARGIN = 0.02
"""Smallest difference that counts, as a share. What another place of code in memory costs lies below."""
LEVEL = 0.95
"""Chance that all intervals of one comparison hold what they should, together (Bonferroni)."""
RESAMPLES = 4000
FENCE = 3.0
"""An outlier lies this many interquartile ranges beyond the quartiles ("far out", Tukey 1977)."""


@dataclass(frozen=True)
class Judgement:
    """One quantity of B against A."""

    name: str
    ratio: Interval
    """B / A: 1.1 is a tenth more."""
    verdict: str

    @property
    def sentence(self) -> str:
        value, low, high = (100 * (end - 1) for end in self.ratio)
        interval = f"{low:+.1f} % to {high:+.1f} %"
        if self.verdict in (SLOWER, FASTER):
            more = "more" if self.verdict == SLOWER else "less"
            return f"{self.name}: B takes {abs(value):.1f} % {more} than A ({interval}), a real difference"
        if self.verdict == SAME:
            return f"{self.name}: no difference that counts, {value:+.1f} % ({interval})"
        return f"{self.name}: undecided, {value:+.1f} % ({interval})"


@dataclass(frozen=True)
class Outliers:
    """Samples of one side far from its others; they stay in every figure."""

    count: int
    samples: int
    largest_ms: float


def judge(name: str, samples: np.ndarray, quantities: int, margin: float = MARGIN) -> Judgement:
    """Judge one of `quantities` quantities. samples float64 [pairs, rounds, 2], A and B, positive."""
    error = (1 - LEVEL) / quantities
    ratio = paired_ratio(samples, 1 - error)
    verdict = verdict_of(ratio, margin)
    if verdict in (SLOWER, FASTER) and sign_test(_pair_ratios(samples)) > error:
        verdict = UNDECIDED
    return Judgement(name, ratio, verdict)


def sign_test(log_ratios: np.ndarray) -> float:
    """Chance that as many of the pairs, or more, agree on which side is slower where neither is (two-sided, exact).

    A bootstrap of the median of ten pairs gives too short intervals where single pairs differ by chance, as times of
    loading do; this holds for any distribution.
    """
    count = len(log_ratios)
    agreeing = max(int((log_ratios > 0).sum()), int((log_ratios < 0).sum()))
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(agreeing, count + 1)) / 2**count)


def verdict_of(ratio: Interval, margin: float) -> str:
    """A real difference is one whose whole interval lies beyond the margin; `same`: none of it does."""
    if ratio.low > 1 + margin:
        return SLOWER
    if ratio.high < 1 / (1 + margin):
        return FASTER
    return SAME if ratio.low >= 1 / (1 + margin) and ratio.high <= 1 + margin else UNDECIDED


def paired_ratio(samples: np.ndarray, level: float, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The median over pairs of median(B) / median(A), with its bootstrap interval at `level`.

    samples float64 [pairs, rounds, 2]. Pairs are drawn with replacement, then the rounds of each (a bootstrap in two
    stages, Davison & Hinkley 1997, section 3.8): both kinds of noise are in the interval.
    """
    pairs, rounds, _ = samples.shape
    random = np.random.default_rng(seed)
    chosen = random.integers(0, pairs, (resamples, pairs))
    within = random.integers(0, rounds, (resamples, pairs, rounds))
    drawn = samples[chosen[..., None], within]
    tail = 50 * (1 - level)
    low, high = np.percentile(_statistic(drawn), (tail, 100 - tail))
    return Interval(*(float(np.exp(value)) for value in (_statistic(samples), low, high)))


def unpaired_ratio(
    a: Sequence[float], b: Sequence[float], level: float, resamples: int = RESAMPLES
) -> Interval:
    """median(b) / median(a) of samples that were not taken in turns: each side is resampled by itself."""
    random = np.random.default_rng(0)

    def medians(values: Sequence[float]) -> np.ndarray:
        array = np.asarray(values, np.float64)
        return np.median(array[random.integers(0, len(array), (resamples, len(array)))], -1)

    tail = 50 * (1 - level)
    low, high = np.percentile(medians(b) / medians(a), (tail, 100 - tail))
    return Interval(float(np.median(b) / np.median(a)), float(low), float(high))


def outliers(samples_ms: np.ndarray) -> Outliers:
    """Count the samples of one side that are far slower than its others. float64 [...]."""
    values = samples_ms.ravel().tolist()
    first, third = percentile(values, 25), percentile(values, 75)
    return Outliers(
        sum(value > third + FENCE * (third - first) for value in values), len(values), max(values)
    )


def summary(judgements: Sequence[Judgement]) -> tuple[str, str]:
    """The verdict of a whole comparison and one sentence for it."""
    found: dict[str, list[str]] = {verdict: [] for verdict in (SLOWER, FASTER, UNDECIDED)}
    for judgement in judgements:
        if judgement.verdict in found:
            found[judgement.verdict].append(judgement.name)
    real = [
        f"B is {verdict} than A in {', '.join(found[verdict])}"
        for verdict in (SLOWER, FASTER)
        if found[verdict]
    ]
    if real:
        verdict = SLOWER if not found[FASTER] else FASTER if not found[SLOWER] else "mixed"
        return verdict, "; ".join(real)
    if len(found[UNDECIDED]) == len(judgements):
        return UNDECIDED, "nothing can be told from these samples: take more --pairs"
    if found[UNDECIDED]:
        return SAME, f"no real difference was found; undecided: {', '.join(found[UNDECIDED])}"
    return SAME, "no difference that counts"


def _statistic(samples: np.ndarray) -> np.ndarray:
    """float64 [..., pairs, rounds, 2] -> [...]: the median over pairs of log(median(B) / median(A))."""
    return np.median(_pair_ratios(samples), -1)


def _pair_ratios(samples: np.ndarray) -> np.ndarray:
    """float64 [..., pairs, rounds, 2] -> [..., pairs]: log(median(B) / median(A)) of each pair."""
    medians = np.median(samples, -2)
    return np.log(medians[..., 1] / medians[..., 0])
