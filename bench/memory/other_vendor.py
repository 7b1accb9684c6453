"""Recall of facts when the question shows another vendor's drawing of the object."""

from __future__ import annotations

from typing import Any

from microvlm.bench.memory.model_under_test import ModelUnderTest, Query
from microvlm.bench.memory.scores import Encoded, nearest_name, right_answers
from microvlm.bench.stats import wilson


def other_vendor(model: ModelUnderTest, encoded: Encoded, count: int) -> dict[str, Any]:
    """Writes `count` facts and asks for each with a view of another vendor's drawing: the share answered right.

    `nearest_neighbour` uses the latents alone: the name of the written fact whose question has the nearest latent.
    """
    queries: list[Query] = [(fact.question, fact.other_vendor_view) for fact in encoded.facts[:count]]
    names = encoded.names[:count]
    memory = model.remember(encoded.keys[:count], encoded.values[:count])
    right = right_answers(model.answers(queries, memory.states), names)
    latents, _ = model.encode(queries)
    return {
        "facts": count,
        "recall": right / count,
        "ci95": wilson(right, count),
        "nearest_neighbour": nearest_name(latents, encoded.latents[:count], names),
    }
