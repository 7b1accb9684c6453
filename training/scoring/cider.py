"""CIDEr-D: n-grams that an answer shares with people's captions, weighted by how rare they are over all pictures
(Vedantam et al. 2015, arXiv 1411.5726, sections 4 and 5).

Written here because the packages that hold it bring Java programs or speech models of more than 100 MB. Numbers are
those of pycocoevalcap, whose details are kept: rarity is counted over the pictures that are scored, the length in the
penalty counts pairs of words, and the mean over references is multiplied by 10.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LONGEST = 4
"""Words of the longest n-grams."""
SIGMA = 6.0
"""Standard deviation of the penalty on lengths."""
SCALE = 10.0
Words = Sequence[str]
Counts = Counter[tuple[str, ...]]


class _Vector(NamedTuple):
    """A text's n-grams with their weights, by length."""

    weights: list[dict[tuple[str, ...], float]]
    norms: list[float]
    pairs: int


def cider_d(answers: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """CIDEr-D of each picture's answer against the picture's captions -> float64 [pictures], 0 to 10.

    The score of a data set is the mean. Raises ValueError for fewer than two pictures, among which nothing is rare, and
    for a picture without captions.
    """
    if len(answers) < 2 or not all(references):
        raise ValueError("CIDEr-D needs two pictures or more, each with a caption")
    counted = [[_count(words) for words in group] for group in references]
    frequency = Counter(ngram for group in counted for ngram in set().union(*group))
    all_pictures = math.log(len(counted))

    def vector(counts: Counts) -> _Vector:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for ngram, count in counts.items():
            weights[len(ngram) - 1][ngram] = count * (all_pictures - math.log(max(1, frequency[ngram])))
        norms = [math.sqrt(sum(weight**2 for weight in part.values())) for part in weights]
        return _Vector(weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))

    scores = []
    for words, group in zip(answers, counted, strict=True):
        answer = vector(_count(words))
        scores.append(SCALE * float(np.mean([_similarity(answer, vector(counts)) for counts in group])))
    return np.array(scores)


def _similarity(answer: _Vector, reference: _Vector) -> float:
    """Mean cosine over the lengths of n-grams. A word counts at most as often as the reference has it."""
    total = 0.0
    for ours, theirs, norm, other in zip(
        answer.weights, reference.weights, answer.norms, reference.norms, strict=True
    ):
        shared = sum(
            min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items() if ngram in theirs
        )
        total += shared / (norm * other) if norm and other else 0.0
    return total / LONGEST * math.exp(-((answer.pairs - reference.pairs) ** 2) / (2 * SIGMA**2))


def _count(words: Words) -> Counts:
    return Counter(
        tuple(words[start : start + length])
        for length in range(1, LONGEST + 1)
        for start in range(len(words) - length + 1)
    )
