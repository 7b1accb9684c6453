"""Larimar's tables (arXiv 2403.11901, section 5) on facts about pictures: recall, forgetting, scope.

Every figure is a share of the model's own greedy answers, except `nearest_neighbour` and `reading`, which score the
memory's latents and so bound what the answers can reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from microvlm.bench.memory.fact_sets import NAMES, QUESTIONS, Fact
from microvlm.bench.memory.model_under_test import ModelUnderTest, Query
from microvlm.bench.stats import equal_error_rate, wilson
from microvlm.memory.episodic import Entry
from microvlm.runtime import Memories

NEGATIVES = ("other_object", "other_question")


class Encoded:
    """Facts with the latents of their questions and values, computed once."""

    def __init__(self, model: ModelUnderTest, facts: Sequence[Fact]):
        self.facts = facts
        questions = [(fact.question, fact.written_view) for fact in facts]
        self.latents, self.keys = model.encode(questions)
        self.values = model.encode_values(questions, [fact.name for fact in facts])
        self.queries: list[Query] = [(fact.question, fact.query_view) for fact in facts]
        self.query_latents, _ = model.encode(self.queries)
        self.names = [fact.name for fact in facts]


def recall_curve(model: ModelUnderTest, encoded: Encoded, counts: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each number of facts: right answers with their 95 % interval, and with the memory reset.

    The encoded facts are divided into groups of `facts` (`trials`); each group is written into an empty memory, and
    every fact of it is asked for. `control` is the accuracy with the memory reset, where the gate stays shut and the
    model says that it does not know; `control_gate_open` opens it. With more facts than slots, several memories are
    read as one; `single` is the accuracy of one memory that holds them all. The names and the first wording of each
    question occur in training; the objects have no fact there.
    """
    return [_recall(model, encoded, count) for count in counts]


def _recall(model: ModelUnderTest, encoded: Encoded, count: int) -> dict[str, Any]:
    starts = range(0, len(encoded.facts) - count + 1, count)
    empty = model.runtime.memory_prior()
    right = control = forced = single = memories = 0
    nearest, reading = [], []
    for start in starts:
        part = slice(start, start + count)
        queries, names = encoded.queries[part], encoded.names[part]
        keys, values = encoded.keys[part], encoded.values[part]
        memory = model.remember(keys, values)
        memories = len(memory.states)
        right += right_answers(model.answers(queries, memory.states), names)
        control += right_answers(model.answers(queries, empty), names)
        with model.gate_open():
            forced += right_answers(model.answers(queries, empty), names)
        latents = np.concatenate([reading.latent for reading in model.readings(queries, memory.states)])
        nearest.append(nearest_name(encoded.query_latents[part], encoded.latents[part], names))
        reading.append(nearest_name(latents, values, names))
        if count > model.slots:
            single_memory = model.remember(keys, values, single=True)
            single += right_answers(model.answers(queries, single_memory.states), names)
    total = count * len(starts)
    row = {
        "facts": count,
        "trials": len(starts),
        "memories": memories,
        "accuracy": right / total,
        "ci95": wilson(right, total),
        "control": control / total,
        "control_ci95": wilson(control, total),
        "control_gate_open": forced / total,
        "nearest_neighbour": float(np.mean(nearest)),
        "reading": float(np.mean(reading)),
    }
    return {**row, "single": single / total} if count > model.slots else row


def forget(model: ModelUnderTest, encoded: Encoded, count: int) -> dict[str, Any]:
    """Fill memories with `count` facts each and forget every fourth fact.

    `forgotten`: recall of those facts, and `attack`: by another wording. `retained`: of the other facts that were
    recalled before, the share that still is; None where there were none.
    """
    tally = dict.fromkeys(("gone", "forgotten", "attack", "known", "retained"), 0)
    for start in range(0, len(encoded.facts) - count + 1, count):
        part = slice(start, start + count)
        memory = model.remember(encoded.keys[part], encoded.values[part])
        queries, names = encoded.queries[part], encoded.names[part]
        before = model.answers(queries, memory.states)
        removed = list(range(0, count, 4))
        for index in reversed(removed):
            memory.forget(model.runtime, index)
        after = model.answers(queries, memory.states)
        facts = encoded.facts[part]
        attack: list[Query] = [(facts[index].paraphrase, facts[index].query_view) for index in removed]
        attack_answers = model.answers(attack, memory.states)
        known_rows = [i for i in range(count) if i % 4 and before[i] == names[i]]
        tally["gone"] += len(removed)
        tally["forgotten"] += sum(after[i] == names[i] for i in removed)
        tally["attack"] += right_answers(attack_answers, [names[i] for i in removed])
        tally["known"] += len(known_rows)
        tally["retained"] += sum(after[i] == names[i] for i in known_rows)
    table: dict[str, Any] = {"facts_forgotten": tally["gone"], "facts_known": tally["known"]}
    for name, of in (("forgotten", "gone"), ("attack", "gone"), ("retained", "known")):
        table[name] = tally[name] / tally[of] if tally[of] else None
        table[f"{name}_ci95"] = wilson(tally[name], tally[of]) if tally[of] else None
    return table


def sequential(
    model: ModelUnderTest, encoded: Encoded, count: int, edits: int, seed: int = 0
) -> dict[str, Any]:
    """Overwrite random ones of `count` facts with other names, `edits` times; the share that says its last name.

    `drift` is the distance of the state from one rebuilt from the log.
    """
    rng = np.random.default_rng(seed)
    memory = model.remember(encoded.keys[:count], encoded.values[:count])
    questions = [(fact.question, fact.written_view) for fact in encoded.facts[:count]]
    last = list(encoded.names[:count])
    chosen, names = rng.integers(count, size=edits), rng.integers(len(NAMES), size=edits)
    latents = model.encode_values([questions[i] for i in chosen], [NAMES[n] for n in names])
    for index, name, latent in zip(chosen, names, latents, strict=True):
        last[index] = NAMES[name]
        memory.overwrite(model.runtime, int(index), Entry(last[index], encoded.keys[index], latent, time=0.0))
    right = right_answers(model.answers(encoded.queries[:count], memory.states), last)
    return {
        "edits": edits,
        "facts": count,
        "retention": right / count,
        "ci95": wilson(right, count),
        "drift": memory.rebuild(model.runtime),
    }


def gate(model: ModelUnderTest, encoded: Encoded, count: int) -> dict[str, Any]:
    """Scores of the scope detector: `count` questions about written facts against questions about nothing written.

    The latter are as many questions about other objects, and the other question about each written object. `auroc` and
    `eer` are of both together, `kinds` of each alone, with intervals that resample questions. `roc`: (false
    alarms, hits) at every threshold, from (0, 0) to (1, 1); `residual_*` are of the residual as a score.
    """
    states = model.remember(encoded.keys[:count], encoded.values[:count]).states
    written_questions = {(fact.object, fact.question) for fact in encoded.facts[:count]}
    questions = [question for question, _ in QUESTIONS]
    another: list[Query] = [
        (question, fact.query_view)
        for fact in encoded.facts[:count]
        for question in questions
        if (fact.object, question) not in written_questions
    ]
    groups = {
        "known": encoded.queries[:count],
        "other_object": encoded.queries[count : 2 * count],
        "other_question": another,
    }
    scores = {name: _scope_scores(model, queries, states) for name, queries in groups.items()}
    table: dict[str, Any] = {"kinds": {}}
    for row, name in enumerate(("", "residual_")):
        known_scores = scores["known"][row]
        unknown_scores = np.concatenate([scores[kind][row] for kind in NEGATIVES])
        table[f"{name}auroc"], table[f"{name}eer"] = equal_error_rate(known_scores, unknown_scores)
        table[f"{name}roc"] = roc(known_scores, unknown_scores)
    known_scores, unknown_scores = scores["known"][0], np.concatenate([scores[kind][0] for kind in NEGATIVES])
    table["auroc_ci95"], table["eer_ci95"] = _resampled(known_scores, unknown_scores)
    for kind in NEGATIVES:
        auroc, eer = equal_error_rate(known_scores, scores[kind][0])
        table["kinds"][kind] = {"questions": len(groups[kind]), "auroc": auroc, "eer": eer}
    return table


def _scope_scores(
    model: ModelUnderTest, queries: Sequence[Query], states: Memories
) -> tuple[np.ndarray, np.ndarray]:
    """(the detector's probability, the residual with its sign turned), float [n] each: high for what is in scope."""
    readings = model.readings(queries, states)
    return (
        np.concatenate([reading.scope for reading in readings]),
        -np.concatenate([reading.residual for reading in readings]),
    )


def _resampled(
    known_scores: np.ndarray, unknown_scores: np.ndarray, draws: int = 500
) -> tuple[tuple[float, float], tuple[float, float]]:
    """95 % intervals of area and equal error rate, both groups resampled."""
    rng = np.random.default_rng(0)
    scores = [
        equal_error_rate(
            rng.choice(known_scores, len(known_scores)), rng.choice(unknown_scores, len(unknown_scores))
        )
        for _ in range(draws)
    ]
    low, high = np.percentile(scores, (2.5, 97.5), axis=0)
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


def addressing(model: ModelUnderTest, encoded: Encoded, count: int) -> dict[str, Any]:
    """Use of the slots of one state by `count` facts.

    `weights`: the keys w, one row for each fact in the order of writing, one column for each slot. `slot_use`:
    1 - U_kk, the share of its prior variance that a slot lost by writing: 0 untouched, near 1 settled.
    `effective_slots`: exp of the entropy of the squared weights over slots; K where all carry alike.
    """
    weights = encoded.keys[:count]
    states = model.remember(weights, encoded.values[:count]).states
    share = np.square(weights, dtype=np.float64).sum(0)
    share = share[share > 0] / share.sum()
    return {
        "weights": [[round(float(weight), 3) for weight in row] for row in weights],
        "slot_use": [round(float(1 - value), 4) for value in np.diagonal(states[0].covariance[0])],
        "effective_slots": round(float(np.exp(-(share * np.log(share)).sum())), 2),
    }


def roc(positive: np.ndarray, negative: np.ndarray) -> list[tuple[float, float]]:
    """(false alarms, hits) for thresholds from above all scores to below them, corners alone."""
    thresholds = np.unique(np.concatenate([positive, negative]))[::-1]
    alarms = (negative[:, None] >= thresholds).mean(0)
    hits = (positive[:, None] >= thresholds).mean(0)
    points = [
        (0.0, 0.0),
        *((round(float(x), 4), round(float(y), 4)) for x, y in zip(alarms, hits, strict=True)),
    ]
    # Points inside of a straight step are left out.
    return [
        point
        for index, point in enumerate(points)
        if not 0 < index < len(points) - 1
        or not any(points[index - 1][axis] == point[axis] == points[index + 1][axis] for axis in (0, 1))
    ]


def right_answers(answers: Sequence[str], names: Sequence[str]) -> int:
    """Number of answers that equal the name exactly."""
    return sum(answer == name for answer, name in zip(answers, names, strict=True))


def nearest_name(queries: np.ndarray, stored: np.ndarray, names: Sequence[str]) -> float:
    """Share of rows whose nearest stored latent, by cosine, has the row's own name."""
    lengths = np.maximum(np.linalg.norm(stored, axis=1), np.finfo(np.float32).tiny)
    nearest = (queries @ stored.T / lengths).argmax(1)
    return float(np.mean([names[i] == name for i, name in zip(nearest, names, strict=True)]))
