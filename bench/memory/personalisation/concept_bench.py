"""Personalisation: is a picture one of the named concepts, and which? Of the memory, and of the nearest features.

Positives are other views of the written objects, negatives pictures of other things. A positive is right if it gets
the concept's own name, a negative if it gets none. Weighted accuracy is the mean of both shares (Nguyen et al. 2024,
arXiv 2406.09400), so that always declining has .5. Look-alikes: for each concept the stranger whose features are
nearest to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from microvlm.bench.memory.fact_sets import QUESTIONS
from microvlm.bench.memory.model_under_test import ModelUnderTest
from microvlm.bench.memory.personalisation.concept_sets import Concept, ConceptSet
from microvlm.bench.memory.personalisation.nearest_features import NearestFeatures, nearest_of
from microvlm.bench.stats import RESAMPLES, Interval, wilson
from microvlm.memory.facts import FactMemory

QUESTION = QUESTIONS[0][0]
Progress = Callable[[str], None]


class Decisions(NamedTuple):
    """Whether each answer is right, bool [positives] and bool [negatives]."""

    positives: np.ndarray
    negatives: np.ndarray

    def of(self, positives: np.ndarray, negatives: np.ndarray) -> Decisions:
        """Those of some positives and negatives, by index."""
        return Decisions(self.positives[positives], self.negatives[negatives])


def personalisation(
    model: ModelUnderTest, concepts: ConceptSet, counts: Sequence[int], progress: Progress
) -> list[dict[str, Any]]:
    """Two rows for each number of concepts, with all strangers and with look-alikes only. Raises UserError."""
    dealt = [(count, *concepts.deal(count)) for count in counts]  # too few are said before minutes of answers
    rows = []
    for count, written, strangers in dealt:
        progress(f"{count} named concepts and {len(strangers)} strangers")
        rows += _rows(model, concepts, written, strangers)
    return rows


def _rows(
    model: ModelUnderTest, concepts: ConceptSet, written: list[Concept], strangers: list[Concept]
) -> list[dict[str, Any]]:
    features = NearestFeatures(model)
    chosen = concepts.deal_choosing(len(written))
    threshold = features.threshold(*chosen)
    stored = features.features([concept.written for concept in written])
    of_strangers = features.features([concept.asked for concept in strangers])
    nearest, cosines = nearest_of(features.features([concept.asked for concept in written]), stored)
    baseline = Decisions(
        (nearest == np.arange(len(written))) & (cosines >= threshold),
        nearest_of(of_strangers, stored)[1] < threshold,
    )
    memory = memory_decisions(model, written, strangers)
    everything = np.arange(len(written)), np.arange(len(strangers))
    look_alikes = everything[0], np.unique(nearest_of(stored, of_strangers)[0])
    return [
        {
            "concepts": len(written),
            "strangers": kind,
            "positives": len(positives),
            "negatives": len(negatives),
            "memory": described(memory.of(positives, negatives)),
            "nearest_features": described(baseline.of(positives, negatives)),
            "threshold": threshold,
            "threshold_concepts": len(chosen[0]),
            "difference": weighted_difference(
                memory.of(positives, negatives), baseline.of(positives, negatives)
            )._asdict(),
        }
        for kind, (positives, negatives) in (("all", everything), ("look-alikes", look_alikes))
    ]


def memory_decisions(
    model: ModelUnderTest, written: Sequence[Concept], strangers: Sequence[Concept]
) -> Decisions:
    """Write the concepts into an empty memory, and ask about their other views and about the strangers."""
    facts = FactMemory(model.runtime, model.processor)
    for concept in written:
        facts.write(concept.name, QUESTION, concept.written)
    own = [facts.read(QUESTION, concept.asked, model.options) for concept in written]
    others = [facts.read(QUESTION, concept.asked, model.options) for concept in strangers]
    normalize = model.processor.normalize_text
    return Decisions(
        np.array(
            [
                reading.from_memory and normalize(reading.answer) == normalize(concept.name)
                for reading, concept in zip(own, written, strict=True)
            ]
        ),
        np.array([not reading.from_memory for reading in others]),
    )


def described(decisions: Decisions) -> dict[str, Any]:
    """Weighted accuracy with its interval, and both shares with theirs."""
    right, declined = int(decisions.positives.sum()), int(decisions.negatives.sum())
    return {
        "weighted_accuracy": weighted_accuracy(decisions)._asdict(),
        "positives": right / len(decisions.positives),
        "positives_ci95": wilson(right, len(decisions.positives)),
        "negatives": declined / len(decisions.negatives),
        "negatives_ci95": wilson(declined, len(decisions.negatives)),
    }


def weighted_accuracy(decisions: Decisions, seed: int = 0) -> Interval:
    """Mean of the shares of right positives and of right negatives, with its 95 % bootstrap interval."""
    return weighted_difference(decisions, None, seed)


def weighted_difference(first: Decisions, second: Decisions | None, seed: int = 0) -> Interval:
    """Weighted accuracy of the first minus that of the second on the same pictures, or minus 0.

    Positives and negatives are resampled apart, and both methods in pairs.
    """
    rng = np.random.default_rng(seed)
    value, draws = 0.0, np.zeros(RESAMPLES)
    for number, own in enumerate(first):
        differences = own.astype(np.float64) - (0.0 if second is None else second[number])
        value += differences.mean() / 2
        chosen = rng.integers(0, len(differences), (RESAMPLES, len(differences)))
        draws += differences[chosen].mean(1) / 2
    low, high = np.percentile(draws, (2.5, 97.5))
    return Interval(float(value), float(low), float(high))
