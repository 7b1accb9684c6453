"""One-shot edits and what they must leave alone (Larimar's editing tables, arXiv 2403.11901, section 5).

As there, one fact is written into an otherwise empty memory at a time. What a memory with K/2 facts leaves alone is a
harder question, and is asked too (`crowded`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from microvlm.bench.memory_deck import QUESTIONS, Fact
from microvlm.bench.memory_scores import Encoded
from microvlm.bench.memory_subject import Query, Subject
from microvlm.bench.stats import wilson
from microvlm.runtime import Memories

CROWDED_CASES = 100
"""Most cases of a kind."""
ONE_SHOT_CASES = 4
"""Most cases of a kind, after each fact."""
Cases = dict[str, dict[str, Any]]


def edit(subject: Subject, encoded: Encoded, count: int, written: int) -> dict[str, Any]:
    """`count` facts, each written alone.

    `efficacy`: right for the question and picture of the writing; `paraphrase`: for another wording and view;
    `neighbourhood`: the share of neighbours whose answer is the one without a memory, the mean over the kinds in
    `neighbours`. `crowded` has the last again, with `written` facts in one memory.
    """
    told, reworded = 0, 0
    tallies: dict[str, Tally] = {}
    caption_prompt = subject.runtime.config.prompt.caption_prompt
    for index, fact in enumerate(encoded.facts[:count]):
        rows = slice(index, index + 1)
        states = subject.remember(encoded.keys[rows], encoded.values[rows]).states
        asked: list[Query] = [(fact.question, fact.written), (fact.paraphrase, fact.asked)]
        same, other = subject.answers(asked, states)
        told += same == fact.name
        reworded += other == fact.name
        others = [*encoded.facts[index + 1 :], *encoded.facts[:index]]
        _ask(subject, states, neighbours([fact], others, caption_prompt, ONE_SHOT_CASES), tallies)
    return {
        "facts": count,
        "efficacy": told / count,
        "paraphrase": reworded / count,
        **_summary(tallies),
        "crowded": {"facts_written": written, **_crowded(subject, encoded, written)},
    }


def neighbours(
    written: Sequence[Fact], others: Sequence[Fact], caption_prompt: str, most: int = CROWDED_CASES
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


@dataclass
class Tally:
    """Neighbours of one kind, and how many kept their answer."""

    cases: int = 0
    kept: int = 0
    kept_without_gate: int = 0


def _crowded(subject: Subject, encoded: Encoded, written: int) -> dict[str, Any]:
    states = subject.remember(encoded.keys[:written], encoded.values[:written]).states
    facts, tallies = encoded.facts, dict[str, Tally]()
    prompt = subject.runtime.config.prompt.caption_prompt
    _ask(subject, states, neighbours(facts[:written], facts[written:], prompt), tallies)
    return _summary(tallies)


def _ask(
    subject: Subject, states: Memories, kinds: dict[str, list[Query]], tallies: dict[str, Tally]
) -> None:
    """Ask every neighbour without a memory, with it, and with it whatever the gate says; counted into `tallies`."""
    queries = [query for some in kinds.values() for query in some]
    before, after = subject.answers(queries, None), subject.answers(queries, states)
    with subject.gate_open():
        ungated = subject.answers(queries, states)
    named = [kind for kind, some in kinds.items() for _ in some]
    for kind, first, gated, forced in zip(named, before, after, ungated, strict=True):
        tally = tallies.setdefault(kind, Tally())
        tally.cases += 1
        tally.kept += gated == first
        tally.kept_without_gate += forced == first


def _summary(tallies: dict[str, Tally]) -> dict[str, Any]:
    kinds: Cases = {
        kind: {
            "cases": tally.cases,
            "kept": tally.kept / tally.cases,
            "ci95": wilson(tally.kept, tally.cases),
            "kept_without_gate": tally.kept_without_gate / tally.cases,
        }
        for kind, tally in tallies.items()
    }
    return {
        "neighbourhood": float(np.mean([kind["kept"] for kind in kinds.values()])),
        "neighbourhood_without_gate": float(np.mean([kind["kept_without_gate"] for kind in kinds.values()])),
        "neighbours": kinds,
    }
