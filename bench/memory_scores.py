"""Larimar's tables (arXiv 2403.11901, section 5) on facts about pictures: recall, edits, forgetting, scope.

Every figure is a share of answers that the model itself gave, greedily; nothing is scored from the codes but
`nearest_neighbour` and `reading`, which say how much the codes could give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from microvlm.bench.memory_deck import NAMES, Fact
from microvlm.bench.memory_subject import Query, Subject
from microvlm.bench.stats import equal_error_rate, wilson
from microvlm.episodic import Entry


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
    """One row a number of facts written: right answers with their 95 % interval, and with the memory reset.

    Beyond the slots, several memories are read as one; `single` is the accuracy of one memory that took them all.
    """
    rows = []
    empty = subject.runtime.memory_prior()
    for count in counts:
        asked, names = encoded.asked[:count], encoded.names[:count]
        memory = subject.remember(encoded.keys[:count], encoded.values[:count])
        right = _right(subject.answers(asked, memory.states), names)
        control = _right(subject.answers(asked, empty), names)
        recalled = np.concatenate([reading.code for reading in subject.readings(asked, memory.states)])
        row = {
            "facts": count,
            "memories": len(memory.states),
            "accuracy": right / count,
            "ci95": wilson(right, count),
            "control": control / count,
            "control_ci95": wilson(control, count),
            "nearest_neighbour": _nearest(encoded.asked_codes[:count], encoded.codes[:count], names),
            "reading": _nearest(recalled, encoded.values[:count], names),
        }
        if count > subject.slots:
            one = subject.remember(encoded.keys[:count], encoded.values[:count], single=True)
            row["single"] = _right(subject.answers(asked, one.states), names) / count
        rows.append(row)
    return rows


def edit(subject: Subject, encoded: Encoded, count: int) -> dict[str, float]:
    """One fact in an otherwise empty memory, `count` times: the same question and picture (efficacy), another wording
    and view (paraphrase), and whether the caption of another object stays as it was without a memory (neighbourhood).
    """
    prompt = subject.runtime.config.prompt.caption_prompt
    totals = dict.fromkeys(("efficacy", "paraphrase", "neighbourhood", "neighbourhood_without_gate"), 0)
    for index, fact in enumerate(encoded.facts[:count]):
        rows = slice(index, index + 1)
        states = subject.remember(encoded.keys[rows], encoded.values[rows]).states
        other: Query = (prompt, encoded.facts[(index + 1) % len(encoded.facts)].asked)
        same, reworded, near = subject.answers(
            [(fact.question, fact.written), (fact.paraphrase, fact.asked), other], states
        )
        with subject.gate_open():
            (ungated,) = subject.answers([other], states)
        (before,) = subject.answers([other], None)
        totals["efficacy"] += same == fact.name
        totals["paraphrase"] += reworded == fact.name
        totals["neighbourhood"] += near == before
        totals["neighbourhood_without_gate"] += ungated == before
    return {name: total / count for name, total in totals.items()}


def forget(subject: Subject, encoded: Encoded, count: int) -> dict[str, float | None]:
    """`count` facts written, every fourth forgotten: recall of those (`forgotten`, and by another wording: `attack`),
    and of what was recalled before, the share that still is (`retained`; None where nothing was)."""
    memory = subject.remember(encoded.keys[:count], encoded.values[:count])
    names = encoded.names[:count]
    before = subject.answers(encoded.asked[:count], memory.states)
    gone = list(range(0, count, 4))
    for index in reversed(gone):
        memory.forget(subject.runtime, index)
    after = subject.answers(encoded.asked[:count], memory.states)
    attack = [(encoded.facts[index].paraphrase, encoded.facts[index].asked) for index in gone]
    kept = [i for i in range(count) if i % 4 and before[i] == names[i]]
    return {
        "forgotten": sum(after[i] == names[i] for i in gone) / len(gone),
        "retained": sum(after[i] == names[i] for i in kept) / len(kept) if kept else None,
        "attack": _right(subject.answers(attack, memory.states), [names[i] for i in gone]) / len(gone),
    }


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
    right = _right(subject.answers(encoded.asked[:count], memory.states), last)
    return {
        "edits": edits,
        "facts": count,
        "retention": right / count,
        "ci95": wilson(right, count),
        "drift": memory.rebuild(subject.runtime),
    }


def gate(subject: Subject, encoded: Encoded, count: int) -> dict[str, float]:
    """The scope detector on `count` questions about what was written and as many about objects that were not."""
    states = subject.remember(encoded.keys[:count], encoded.values[:count]).states
    asked = subject.readings(encoded.asked[: 2 * count], states)
    scope = np.concatenate([reading.scope for reading in asked])
    residual = np.concatenate([reading.residual for reading in asked])
    auroc, eer = equal_error_rate(scope[:count], scope[count:])
    residual_auroc, residual_eer = equal_error_rate(-residual[:count], -residual[count:])
    return {"auroc": auroc, "eer": eer, "residual_auroc": residual_auroc, "residual_eer": residual_eer}


def _right(answers: Sequence[str], names: Sequence[str]) -> int:
    return sum(answer == name for answer, name in zip(answers, names, strict=True))


def _nearest(queries: np.ndarray, stored: np.ndarray, names: Sequence[str]) -> float:
    """Share of rows whose nearest stored code, by the cosine, has the row's own name."""
    lengths = np.maximum(np.linalg.norm(stored, axis=1), np.finfo(np.float32).tiny)
    found = (queries @ stored.T / lengths).argmax(1)
    return float(np.mean([names[i] == name for i, name in zip(found, names, strict=True)]))
