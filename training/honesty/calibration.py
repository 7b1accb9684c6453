"""From log probabilities and whether the answers were right to a map of confidence and a threshold. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from microvlm.configuration.answers import AnswersConfig

MOST_POINTS = 32
MOST_DECLINED = 0.05
"""Share of the right answers that a threshold may decline."""


class Block(NamedTuple):
    """Neighbouring answers that got one value."""

    place: float
    """Mean log probability."""
    value: float
    """Share that is right."""
    weight: float
    """Answers."""


def pool_adjacent_violators(places: np.ndarray, values: np.ndarray) -> list[Block]:
    """Isotonic regression: the blocks of the non-decreasing function of `places` nearest to `values`, both [n].

    Least squares (Barlow et al. 1972). Equal places are one block from the start.
    """
    order = np.argsort(places, kind="stable")
    blocks: list[Block] = []
    distinct, starts = np.unique(places[order], return_index=True)
    for place, group in zip(distinct, np.split(values[order], starts[1:]), strict=True):
        blocks.append(Block(float(place), float(group.mean()), float(len(group))))
        while len(blocks) > 1 and blocks[-2].value >= blocks[-1].value:
            right, left = blocks.pop(), blocks.pop()
            blocks.append(_merged(left, right))
    return blocks


def reduce_blocks(blocks: Sequence[Block], most: int = MOST_POINTS) -> list[Block]:
    """At most `most` blocks: neighbours whose merging changes least, in squares, become one. Values stay in order."""
    kept = list(blocks)
    while len(kept) > most:
        costs = [
            left.weight * right.weight / (left.weight + right.weight) * (right.value - left.value) ** 2
            for left, right in pairwise(kept)
        ]
        at = int(np.argmin(costs))
        kept[at : at + 2] = [_merged(kept[at], kept[at + 1])]
    return kept


def fit_answers(log_probabilities: np.ndarray, right: np.ndarray, old: AnswersConfig | None) -> AnswersConfig:
    """The calibration of answers with log probabilities [n] of which bool [n] were right; texts are those of `old`.

    The map goes through the mean of each block. The threshold is the largest that declines at most `MOST_DECLINED` of
    the right answers. Raises ValueError without a right answer.
    """
    if not right.any():
        raise ValueError("a calibration needs right answers")
    blocks = reduce_blocks(pool_adjacent_violators(log_probabilities, right.astype(np.float64)))
    points = tuple(min(block.place, 0.0) for block in blocks)
    values = tuple(min(max(block.value, 0.0), 1.0) for block in blocks)
    old = old or AnswersConfig()
    fitted = AnswersConfig(points, values, 0.0, old.decline, old.declining)
    confidences = np.array([fitted.confidence(value) for value in log_probabilities[right]])
    threshold = choose_threshold(confidences)
    return AnswersConfig(points, values, threshold, old.decline, old.declining)


def choose_threshold(confidences: np.ndarray, most: float = MOST_DECLINED) -> float:
    """The largest threshold below which at most the share `most` of right answers' confidences [n] lies."""
    # A share that is a whole number of answers must not become one answer less by rounding.
    allowed = int(most * len(confidences) + 1e-9)
    return float(np.sort(confidences)[min(allowed, len(confidences) - 1)])


def _merged(left: Block, right: Block) -> Block:
    weight = left.weight + right.weight
    return Block(
        (left.place * left.weight + right.place * right.weight) / weight,
        (left.value * left.weight + right.value * right.weight) / weight,
        weight,
    )
