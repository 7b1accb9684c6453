"""Larimar's tables (arXiv 2403.11901, section 5) on facts about pictures: recall, forgetting, scope.

Every figure is a share of answers that the model itself gave, greedily; nothing is scored from the codes but
`nearest_neighbour` and `reading`, which say how much the codes could give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from microvlm.bench.memory.fact_sets import NAMES, QUESTIONS, Fact
from microvlm.bench.memory.memory_subject import Query, Subject
from microvlm.bench.stats import equal_error_rate, wilson
from microvlm.memory.episodic import Entry
from microvlm.runtime import Memories

NEGATIVES = ("other_object", "other_question")


class Encoded:
    """Facts with the codes of their questions and values, made once."""

    def __init__(self, subject: Subject, facts: Sequence[Fact]):
        self.facts = facts
        told = [(fact.question, fact.written) for fact in facts]
        self.codes, self.keys = subject.encode(told)
        self.values = subject.encode_values(told, [fact.name for fact in facts])
        self.asked: list[Query] = [(fact.question, fact.asked) for fact in facts]
        self.asked_codes, _ = subject.encode(self.asked)
        self.names = [fact.name for fact in facts]


def recall_curve(subject: Subject, encoded: Encoded, counts: Sequence[int]) -> list[dict[str, Any]]:
    """One row a number of facts written at once: right answers with their 95 % interval, and with the memory reset.

    As many times `facts` of the encoded facts as there are are written, each time into an empty memory (`trials`), and
    all are asked for. `control` is the accuracy with the memory reset, where the gate keeps it shut and the model says
    that it does not know; `control_gate_open` lets the reset memory speak. Beyond the slots, several memories are read
    as one; `single` is the accuracy of one memory that took them all. The names are ones that training has as answers,
    and the first wording of each question is one that it asks; the objects have no fact there.
    """
    return [_recall(subject, encoded, count) for count in counts]


def _recall(subject: Subject, encoded: Encoded, count: int) -> dict[str, Any]:
    starts = range(0, len(encoded.facts) - count + 1, count)
    empty = subject.runtime.memory_prior()
    right = control = forced = single = memories = 0
    nearest, reading = [], []
    for start in starts:
        part = slice(start, start + count)
        asked, names = encoded.asked[part], encoded.names[part]
        keys, values = encoded.keys[part], encoded.values[part]
        memory = subject.remember(keys, values)
        memories = len(memory.states)
        right += right_answers(subject.answers(asked, memory.states), names)
        control += right_answers(subject.answers(asked, empty), names)
        with subject.gate_open():
            forced += right_answers(subject.answers(asked, empty), names)
        recalled = np.concatenate([read.latent for read in subject.readings(asked, memory.states)])
        nearest.append(nearest_name(encoded.asked_codes[part], encoded.codes[part], names))
        reading.append(nearest_name(recalled, values, names))
        if count > subject.slots:
            one = subject.remember(keys, values, single=True)
            single += right_answers(subject.answers(asked, one.states), names)
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
    return {**row, "single": single / total} if count > subject.slots else row


def forget(subject: Subject, encoded: Encoded, count: int) -> dict[str, Any]:
    """Memories of `count` facts, as many as the facts fill, and every fourth fact forgotten: recall of those
    (`forgotten`, and by another wording: `attack`), and of what was recalled before, the share that still is
    (`retained`; None where nothing was)."""
    tally = dict.fromkeys(("gone", "forgotten", "attack", "known", "retained"), 0)
    for start in range(0, len(encoded.facts) - count + 1, count):
        part = slice(start, start + count)
        memory = subject.remember(encoded.keys[part], encoded.values[part])
        asked, names = encoded.asked[part], encoded.names[part]
        before = subject.answers(asked, memory.states)
        gone = list(range(0, count, 4))
        for index in reversed(gone):
            memory.forget(subject.runtime, index)
        after = subject.answers(asked, memory.states)
        facts = encoded.facts[part]
        attack: list[Query] = [(facts[index].paraphrase, facts[index].asked) for index in gone]
        said = subject.answers(attack, memory.states)
        kept = [i for i in range(count) if i % 4 and before[i] == names[i]]
        tally["gone"] += len(gone)
        tally["forgotten"] += sum(after[i] == names[i] for i in gone)
        tally["attack"] += right_answers(said, [names[i] for i in gone])
        tally["known"] += len(kept)
        tally["retained"] += sum(after[i] == names[i] for i in kept)
    table: dict[str, Any] = {"facts_forgotten": tally["gone"], "facts_known": tally["known"]}
    for name, of in (("forgotten", "gone"), ("attack", "gone"), ("retained", "known")):
        table[name] = tally[name] / tally[of] if tally[of] else None
        table[f"{name}_ci95"] = wilson(tally[name], tally[of]) if tally[of] else None
    return table


def sequential(subject: Subject, encoded: Encoded, count: int, edits: int, seed: int = 0) -> dict[str, Any]:
    """`edits` overwrites, one after the other, of `count` facts by other names: the share that says its last name.

    `drift` is how far the state then is from one rebuilt of the log.
    """
    rng = np.random.default_rng(seed)
    memory = subject.remember(encoded.keys[:count], encoded.values[:count])
    told = [(fact.question, fact.written) for fact in encoded.facts[:count]]
    last = list(encoded.names[:count])
    chosen, names = rng.integers(count, size=edits), rng.integers(len(NAMES), size=edits)
    codes = subject.encode_values([told[i] for i in chosen], [NAMES[n] for n in names])
    for index, name, code in zip(chosen, names, codes, strict=True):
        last[index] = NAMES[name]
        memory.overwrite(subject.runtime, int(index), Entry(last[index], encoded.keys[index], code, time=0.0))
    right = right_answers(subject.answers(encoded.asked[:count], memory.states), last)
    return {
        "edits": edits,
        "facts": count,
        "retention": right / count,
        "ci95": wilson(right, count),
        "drift": memory.rebuild(subject.runtime),
    }


def gate(subject: Subject, encoded: Encoded, count: int) -> dict[str, Any]:
    """The scope detector on `count` questions about what was written against questions about what was not: as many
    about objects that no fact is about, and the other question about each object that a fact is about.

    `auroc` and `eer` are of both together, `kinds` of each alone, with intervals that resample questions. `roc`: (false
    alarms, hits) at every threshold, from (0, 0) to (1, 1); `residual_*` are of the residual as a score.
    """
    states = subject.remember(encoded.keys[:count], encoded.values[:count]).states
    taken = {(fact.object, fact.question) for fact in encoded.facts[:count]}
    questions = [question for question, _ in QUESTIONS]
    another: list[Query] = [
        (question, fact.asked)
        for fact in encoded.facts[:count]
        for question in questions
        if (fact.object, question) not in taken
    ]
    groups = {
        "known": encoded.asked[:count],
        "other_object": encoded.asked[count : 2 * count],
        "other_question": another,
    }
    scores = {name: _scope_scores(subject, queries, states) for name, queries in groups.items()}
    table: dict[str, Any] = {"kinds": {}}
    for row, name in enumerate(("", "residual_")):
        known = scores["known"][row]
        unknown = np.concatenate([scores[kind][row] for kind in NEGATIVES])
        table[f"{name}auroc"], table[f"{name}eer"] = equal_error_rate(known, unknown)
        table[f"{name}roc"] = roc(known, unknown)
    known, unknown = scores["known"][0], np.concatenate([scores[kind][0] for kind in NEGATIVES])
    table["auroc_ci95"], table["eer_ci95"] = _resampled(known, unknown)
    for kind in NEGATIVES:
        auroc, eer = equal_error_rate(known, scores[kind][0])
        table["kinds"][kind] = {"questions": len(groups[kind]), "auroc": auroc, "eer": eer}
    return table


def _scope_scores(
    subject: Subject, queries: Sequence[Query], states: Memories
) -> tuple[np.ndarray, np.ndarray]:
    """(the detector's probability, the residual with its sign turned), float [n] each: high for what is in scope."""
    readings = subject.readings(queries, states)
    return (
        np.concatenate([reading.scope for reading in readings]),
        -np.concatenate([reading.residual for reading in readings]),
    )


def _resampled(
    known: np.ndarray, unknown: np.ndarray, draws: int = 500
) -> tuple[tuple[float, float], tuple[float, float]]:
    """95 % intervals of area and equal error rate, both groups resampled."""
    rng = np.random.default_rng(0)
    found = [
        equal_error_rate(rng.choice(known, len(known)), rng.choice(unknown, len(unknown)))
        for _ in range(draws)
    ]
    low, high = np.percentile(found, (2.5, 97.5), axis=0)
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


def addressing(subject: Subject, encoded: Encoded, count: int) -> dict[str, Any]:
    """How `count` facts in one state used its slots.

    `weights`: the keys w, a row a fact in the order of writing, a column a slot. `slot_use`: 1 - U_kk, the share of its
    prior variance that a slot lost by what was written: 0 untouched, near 1 settled. `effective_slots`: exp of the
    entropy of the squared weights over slots, K where all carry alike.
    """
    weights = encoded.keys[:count]
    states = subject.remember(weights, encoded.values[:count]).states
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
    # A point amid a straight step says nothing.
    return [
        point
        for index, point in enumerate(points)
        if not 0 < index < len(points) - 1
        or not any(points[index - 1][axis] == point[axis] == points[index + 1][axis] for axis in (0, 1))
    ]


def right_answers(answers: Sequence[str], names: Sequence[str]) -> int:
    """How many answers are the name, to the letter."""
    return sum(answer == name for answer, name in zip(answers, names, strict=True))


def nearest_name(queries: np.ndarray, stored: np.ndarray, names: Sequence[str]) -> float:
    """Share of rows whose nearest stored code, by the cosine, has the row's own name."""
    lengths = np.maximum(np.linalg.norm(stored, axis=1), np.finfo(np.float32).tiny)
    found = (queries @ stored.T / lengths).argmax(1)
    return float(np.mean([names[i] == name for i, name in zip(found, names, strict=True)]))
