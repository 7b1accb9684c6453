"""One-shot edits and what they must leave alone (Larimar's editing tables, arXiv 2403.11901, section 5).

As in that paper, each fact is written alone into an empty memory. `crowded` measures the harder case: what a memory
with K/2 facts leaves alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from microvlm.bench.memory.fact_sets import QUESTIONS, Fact
from microvlm.bench.memory.model_under_test import ModelUnderTest, Query
from microvlm.bench.memory.scores import Encoded
from microvlm.bench.stats import bootstrap, wilson
from microvlm.runtime import Memories

ONE_SHOT_CASES, CROWDED_CASES = 4, 50
"""Most cases of a kind, of one memory."""
CROWDED_MEMORIES = 4
"""Most memories that are filled with K/2 facts."""


def edit(model: ModelUnderTest, encoded: Encoded, count: int, written_count: int) -> dict[str, Any]:
    """`count` facts, each written alone.

    `efficacy`: right for the question and picture of the writing; `paraphrase`: for another wording and view;
    `neighbourhood`: the share of neighbours whose answer is the one without a memory, the mean over the kinds in
    `neighbours`. `crowded` has the last again, of memories with `written_count` facts each.
    """
    right, reworded = 0, 0
    memories: list[Tallies] = []
    for index, fact in enumerate(encoded.facts[:count]):
        states = _remember(model, encoded, [index])
        queries: list[Query] = [(fact.question, fact.written_view), (fact.paraphrase, fact.query_view)]
        same, other = model.answers(queries, states)
        right += same == fact.name
        reworded += other == fact.name
        memories.append(_compare_answers(model, encoded, states, [index], ONE_SHOT_CASES))
    starts = range(0, len(encoded.facts) - written_count + 1, written_count)[:CROWDED_MEMORIES]
    parts = [list(range(start, start + written_count)) for start in starts]
    crowded = [
        _compare_answers(model, encoded, _remember(model, encoded, part), part, CROWDED_CASES)
        for part in parts
    ]
    return {
        "facts": count,
        "efficacy": right / count,
        "efficacy_ci95": wilson(right, count),
        "paraphrase": reworded / count,
        "paraphrase_ci95": wilson(reworded, count),
        **_summary(memories),
        "crowded": {"facts_written": written_count, "memories": len(parts), **_summary(crowded)},
    }


def neighbours(
    written: Sequence[Fact], others: Sequence[Fact], caption_prompt: str, most: int = CROWDED_CASES
) -> dict[str, list[Query]]:
    """Questions that the `written` facts must not answer, at most `most` a kind; `others` are in no memory, those most
    like the written ones first.

    The caption of an object that nothing was written about; a written question about such an object, and about one that
    looks like a written one; about an object that something was written about, its caption and the questions that were
    not written.
    """
    objects = {fact.object for fact in written}
    written_questions = {(fact.object, fact.question) for fact in written}
    alike = list({fact.object: fact for fact in others if fact.object not in objects}.values())
    # Without those that look like a written one, and evenly over the rest.
    rest = alike[most:] or alike
    unknown = rest[:: max(1, len(rest) // most)][:most]
    questions = [caption_prompt, *(question for question, _ in QUESTIONS)]
    another: list[Query] = [
        (question, fact.query_view)
        for fact in written
        for question in questions
        if (fact.object, question) not in written_questions
    ]
    return {
        "other_caption": [(caption_prompt, fact.query_view) for fact in unknown],
        "other_object": [
            (written[i % len(written)].question, fact.query_view) for i, fact in enumerate(unknown)
        ],
        "like_object": [
            (written[i % len(written)].question, fact.query_view) for i, fact in enumerate(alike[:most])
        ],
        "other_question": another[:: max(1, len(another) // most)][:most],
    }


class Tally(NamedTuple):
    """Neighbours of one kind of one memory, and how many kept their answer."""

    cases: int
    kept: int
    kept_without_gate: int


Tallies = dict[str, Tally]


def _remember(model: ModelUnderTest, encoded: Encoded, rows: list[int]) -> Memories:
    return model.remember(encoded.keys[rows], encoded.values[rows]).states


def _compare_answers(
    model: ModelUnderTest, encoded: Encoded, states: Memories, rows: list[int], most: int
) -> Tallies:
    """Answers to every neighbour without a memory, with it, and with it and the gate open, compared."""
    prompt = model.runtime.config.prompt.caption_prompt
    kinds = neighbours([encoded.facts[row] for row in rows], nearest_others(encoded, rows), prompt, most)
    tallies = {}
    for kind, queries in kinds.items():
        before, after = model.answers(queries, None), model.answers(queries, states)
        with model.gate_open():
            ungated = model.answers(queries, states)
        kept_count, forced = (
            sum(a == b for a, b in zip(answers, before, strict=True)) for answers in (after, ungated)
        )
        tallies[kind] = Tally(len(queries), kept_count, forced)
    return tallies


def nearest_others(encoded: Encoded, rows: list[int]) -> list[Fact]:
    """The facts about other objects than those of `rows`, most alike first: by the best cosine of question latents."""
    written_objects = {encoded.facts[row].object for row in rows}
    likeness = (encoded.query_latents @ encoded.latents[rows].T).max(1)
    order = np.argsort(-likeness, kind="stable")
    return [encoded.facts[row] for row in order if encoded.facts[row].object not in written_objects]


def _summary(memories: list[Tallies]) -> dict[str, Any]:
    """Shares by kind over all memories, and their mean with an interval that resamples memories, not cases."""
    names = list(memories[0])
    # [memory, kind, (cases, kept, kept without gate)]
    table = np.array([[tallies[name] for name in names] for tallies in memories])

    def share(rows: np.ndarray, column: int = 1) -> float:
        return float((rows[:, :, column].sum(0) / rows[:, :, 0].sum(0)).mean())

    kinds = {}
    for name, (cases, kept_count, forced) in zip(names, table.sum(0).tolist(), strict=True):
        kinds[name] = {
            "cases": cases,
            "kept": kept_count / cases,
            "ci95": wilson(kept_count, cases),
            "kept_without_gate": forced / cases,
        }
    interval = bootstrap(share, table)
    return {
        "neighbourhood": interval.value,
        "neighbourhood_ci95": (interval.low, interval.high),
        "neighbourhood_without_gate": share(table, 2),
        "neighbours": kinds,
    }
