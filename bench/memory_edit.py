"""One-shot edits and what they must leave alone (Larimar's editing tables, arXiv 2403.11901, section 5).

Efficacy and paraphrase are of one fact in an otherwise empty memory; neighbours are asked of a memory with K/2 facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from microvlm.bench.memory_deck import QUESTIONS, Fact
from microvlm.bench.memory_scores import Encoded
from microvlm.bench.memory_subject import Query, Subject
from microvlm.bench.stats import wilson

NEIGHBOURS = 100
"""Most cases of a kind."""


def edit(subject: Subject, encoded: Encoded, count: int, written: int) -> dict[str, Any]:
    """`efficacy`: the question and picture of the writing; `paraphrase`: another wording and view; `count` facts each.

    `neighbourhood`: with `written` facts in one memory, the share of neighbours whose answer is the one without a
    memory, the mean over the kinds in `neighbours`.
    """
    told, reworded = 0, 0
    for index, fact in enumerate(encoded.facts[:count]):
        rows = slice(index, index + 1)
        states = subject.remember(encoded.keys[rows], encoded.values[rows]).states
        asked: list[Query] = [(fact.question, fact.written), (fact.paraphrase, fact.asked)]
        same, other = subject.answers(asked, states)
        told += same == fact.name
        reworded += other == fact.name
    kinds = _kept(subject, encoded, written)
    return {
        "efficacy": told / count,
        "paraphrase": reworded / count,
        "neighbourhood": float(np.mean([kind["kept"] for kind in kinds.values()])),
        "neighbourhood_without_gate": float(np.mean([kind["kept_without_gate"] for kind in kinds.values()])),
        "facts_written": written,
        "neighbours": kinds,
    }


def neighbours(
    written: Sequence[Fact], others: Sequence[Fact], caption_prompt: str, most: int = NEIGHBOURS
) -> dict[str, list[Query]]:
    """Questions that the `written` facts must not answer, at most `most` a kind; `others` are not in the memory.

    The caption of an object that nothing was written about; a written question about such an object; about an object
    that something was written about, its caption and the questions that were not written.
    """
    objects = {fact.object for fact in written}
    taken = {(fact.object, fact.question) for fact in written}
    strangers = {fact.object: fact for fact in others if fact.object not in objects}
    unknown = list(strangers.values())[:most]
    questions = [caption_prompt, *(question for question, _ in QUESTIONS)]
    another: list[Query] = [
        (question, fact.asked)
        for fact in written
        for question in questions
        if (fact.object, question) not in taken
    ]
    return {
        "other_caption": [(caption_prompt, fact.asked) for fact in unknown],
        "other_object": [(written[i % len(written)].question, fact.asked) for i, fact in enumerate(unknown)],
        "other_question": another[:: max(1, len(another) // most)][:most],
    }


def _kept(subject: Subject, encoded: Encoded, written: int) -> dict[str, dict[str, Any]]:
    states = subject.remember(encoded.keys[:written], encoded.values[:written]).states
    caption_prompt = subject.runtime.config.prompt.caption_prompt
    kinds: dict[str, dict[str, Any]] = {}
    facts = encoded.facts
    for kind, queries in neighbours(facts[:written], facts[written:], caption_prompt).items():
        before, after = subject.answers(queries, None), subject.answers(queries, states)
        with subject.gate_open():
            ungated = subject.answers(queries, states)
        same = sum(a == b for a, b in zip(after, before, strict=True))
        kinds[kind] = {
            "cases": len(queries),
            "kept": same / len(queries),
            "ci95": wilson(same, len(queries)),
            "kept_without_gate": sum(a == b for a, b in zip(ungated, before, strict=True)) / len(queries),
        }
    return kinds
