"""The regressions of a reading's confidence: fitted to samples of readings, with thresholds within bounds.

Knows no model and no memory; `pointing_fit` makes the samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from microvlm.bench.memory.open_values.pointed_queries import PointedQueries
from microvlm.configuration.pointing import EVIDENCE, PointingConfig, PointingMap, PointingWeights
from microvlm.memory.pointing.confidence import judge_readings, probability_of

MOST_LET_IN = 0.05
"""The thresholds let in at most this share of the strangers of any kind."""
MOST_WRONG = 0.005
"""And give at most this share of wrong texts to questions that have an answer."""
RIDGE = 1e-3
_CALIBRATION_BINS = 15
BANDS = (16, 128)
"""Memories of fewer facts than the first, of fewer than the second, and of more, are held to the bounds apart."""
GRID = np.round(np.arange(0.1, 0.99, 0.02), 2)
"""Thresholds that are tried."""


class Sample(NamedTuple):
    """Questions of one kind, all to memories of one number of facts."""

    kind: str
    """Of `ASKED`, or of a stranger."""
    facts: int
    pointed: PointedQueries
    answers: np.ndarray
    """int [N], index of the entry that answers; -2 where none does."""
    same_picture: np.ndarray
    """bool [N, S], whether the entry that is pointed at is about the picture of the query."""
    same_question: np.ndarray
    """bool [N, S], whether it answers that question."""

    @property
    def is_known(self) -> bool:
        return bool((self.answers >= 0).any())

    @property
    def has_picture(self) -> bool:
        """Of all its questions, or of none."""
        return bool(self.pointed.has_picture.all())

    def is_right(self) -> np.ndarray:
        """bool [N, S]: whether the entry that is pointed at is the one that answers."""
        return self.pointed.entries == self.answers[:, None]


def fit_maps(fitted: Sequence[Sample], held_out: Sequence[Sample], slots: int) -> PointingConfig:
    """Fit the regressions to the first samples, and choose the thresholds by the second ones."""
    pictured, plain = ([sample for sample in fitted if sample.has_picture == kind] for kind in (True, False))
    picture, question = (
        fit_weights(pictured, label)
        for label in (lambda sample: sample.same_picture, lambda sample: sample.same_question)
    )
    answers = fit_weights(plain, Sample.is_right)
    (threshold,) = choose_thresholds([each for each in held_out if not each.has_picture], [answers], slots)
    about_pictures = [each for each in held_out if each.has_picture]
    of_picture, of_question = choose_thresholds(about_pictures, [picture, question], slots)
    return PointingConfig(
        threshold, answers, PointingMap(of_picture, picture), PointingMap(of_question, question)
    )


def fit_weights(samples: Sequence[Sample], label: Callable[[Sample], np.ndarray]) -> PointingWeights:
    """Ridge logistic regression by Newton's method; every kind at every number of facts has the same weight.

    `label` gives what is to be told of each reading, bool [N, S].
    """
    rows, right, weight = _weighted(samples, label)
    mean = weight @ rows
    deviation = np.sqrt(weight @ (rows - mean) ** 2) + 1e-6
    inputs = np.column_stack([(rows - mean) / deviation, np.ones(len(rows))])
    ridge = RIDGE * np.diag([1.0] * len(EVIDENCE) + [1e-6])
    values = np.zeros(inputs.shape[1])
    for _ in range(50):
        chance = 1 / (1 + np.exp(-np.clip(inputs @ values, -30, 30)))
        slope = inputs.T @ (weight * (chance - right)) + ridge @ values
        curve = (inputs * (weight * chance * (1 - chance))[:, None]).T @ inputs + ridge
        values -= np.linalg.solve(curve, slope)
    scaled = values[:-1] / deviation
    numbers = [round(float(value), 4) for value in (*scaled, values[-1] - scaled @ mean)]
    return PointingWeights(*np.clip(numbers, -1e4, 1e4).tolist())


def choose_thresholds(
    samples: Sequence[Sample], weights: Sequence[PointingWeights], slots: int
) -> tuple[float, ...]:
    """A threshold for each of one or two regressions, in steps of .02: those that say most right texts, at which
    `MOST_LET_IN` and `MOST_WRONG` hold; the largest where none do.

    Strangers are counted in memories of each of the `BANDS` apart: there are more of few facts, which let fewer in.
    Wrong texts are counted in memories of at most `slots` facts, whose state is not chosen by the question.
    """
    judged: dict[tuple[str, int], list[np.ndarray]] = {}
    for sample in samples:
        band = int(np.searchsorted(BANDS, sample.facts, side="right"))
        judged.setdefault((sample.kind, band), []).append(_judged(sample, weights))
    known_kinds = {sample.kind for sample in samples if sample.is_known}
    parts = [(kind in known_kinds, np.concatenate(rows)) for (kind, _), rows in judged.items()]
    chosen, most_right = (float(GRID[-1]),) * len(weights), -1.0
    for thresholds in product(GRID, repeat=len(weights)):
        shares = [(known, _said_shares(rows, thresholds, slots)) for known, rows in parts]
        if any(right + wrong > MOST_LET_IN for known, (right, wrong, _) in shares if not known):
            continue
        if np.mean([wrong for known, (_, _, wrong) in shares if known] or [0]) > MOST_WRONG:
            continue
        said = float(np.mean([right for known, (right, _, _) in shares if known] or [0]))
        if said > most_right:
            chosen, most_right = tuple(float(value) for value in thresholds), said
    return chosen


def _judged(sample: Sample, weights: Sequence[PointingWeights]) -> np.ndarray:
    """float64 [N, regressions + 2]: probabilities of each query's surest reading, whether it is right, its facts."""
    pointed = sample.pointed
    probabilities = np.stack([probability_of(pointed.evidence, each) for each in weights], -1)
    probabilities[pointed.entries < 0] = 0.0
    each, best = np.arange(len(pointed.entries)), probabilities.prod(-1).argmax(1)
    right = sample.is_right()[each, best]
    return np.column_stack([probabilities[each, best], right, np.full(len(each), sample.facts)])


def _said_shares(rows: np.ndarray, thresholds: Sequence[float], slots: int) -> tuple[float, float, float]:
    """Of `_judged` rows, the shares with a right text and with a wrong one, and the latter in small memories."""
    said = (rows[:, : len(thresholds)] >= thresholds).all(1)
    right, small = rows[:, -2] > 0, rows[:, -1] <= slots
    wrong = said & ~right
    return float((said & right).mean()), float(wrong.mean()), float(wrong[small].mean() if small.any() else 0)


def shares_by_kind(samples: Sequence[Sample], pointing: PointingConfig) -> list[dict[str, Any]]:
    """By kind: of its questions, the shares with the right text, with a wrong one, and with any."""
    rows = []
    for kind in dict.fromkeys(sample.kind for sample in samples):
        of_kind = [sample for sample in samples if sample.kind == kind]
        surest = [sample.pointed.surest(pointing) for sample in of_kind]
        said = np.concatenate([each.is_said for each in surest])
        right = np.concatenate(
            [each.entries == sample.answers for each, sample in zip(surest, of_kind, strict=True)]
        )
        rows.append(
            {
                "kind": kind,
                "known": any(sample.is_known for sample in of_kind),
                "questions": len(said),
                "right": round(float((said & right).mean()), 4),
                "wrong": round(float((said & ~right).mean()), 4),
                "said": round(float(said.mean()), 4),
            }
        )
    return rows


def calibration_error(samples: Sequence[Sample], pointing: PointingConfig) -> float:
    """Expected calibration error over 15 bins of equal mass, every kind at every number of facts counted alike."""
    rows, right, weight = _weighted(samples, Sample.is_right)
    has_picture = np.concatenate(
        [np.full((sample.pointed.entries >= 0).sum(), sample.has_picture) for sample in samples]
    )
    confidence = judge_readings(rows, has_picture, pointing).confidence
    order = np.argsort(confidence, kind="stable")
    bins = np.minimum((_CALIBRATION_BINS * np.cumsum(weight[order])).astype(int), _CALIBRATION_BINS - 1)
    gaps = weight[order] * (confidence[order] - right[order])
    return float(np.abs(np.bincount(bins, gaps, _CALIBRATION_BINS)).sum())


def _weighted(
    samples: Sequence[Sample], label: Callable[[Sample], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(evidence [R, ...], label [R], weight [R]) of the readings that point at an entry; those of a kind at a number of
    facts weigh alike."""
    # There are more memories of few facts than of many.
    alike = Counter((sample.kind, sample.facts) for sample in samples)
    parts = []
    for sample in samples:
        points = sample.pointed.entries >= 0
        weight = 1 / max(1, int(points.sum())) / alike[sample.kind, sample.facts]
        parts.append(
            (sample.pointed.evidence[points], label(sample)[points], np.full(int(points.sum()), weight))
        )
    rows, right, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
    return rows, right.astype(np.float64), weights / weights.sum()
