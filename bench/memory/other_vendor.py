"""Facts asked for with another vendor's drawing of their object."""

from __future__ import annotations

from typing import Any

from microvlm.bench.memory.memory_subject import Query, Subject
from microvlm.bench.memory.scores import Encoded, nearest_name, right_answers
from microvlm.bench.stats import wilson


def other_vendor(subject: Subject, encoded: Encoded, count: int) -> dict[str, Any]:
    """`count` facts written as ever and asked for with a view of another vendor's drawing: the share answered right.

    `nearest_neighbour` is what the codes give alone: the name of the written fact whose question has the nearest code.
    """
    asked: list[Query] = [(fact.question, fact.other) for fact in encoded.facts[:count]]
    names = encoded.names[:count]
    memory = subject.remember(encoded.keys[:count], encoded.values[:count])
    right = right_answers(subject.answers(asked, memory.states), names)
    codes, _ = subject.encode(asked)
    return {
        "facts": count,
        "recall": right / count,
        "ci95": wilson(right, count),
        "nearest_neighbour": nearest_name(codes, encoded.codes[:count], names),
    }
