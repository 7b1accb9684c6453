"""Facts with values that no training saw: how often their own text comes back, and how many strangers get one.

Beside the reading that chooses an entry stand the nearest key alone, which needs no state, and what the decoder says
from the reading alone. The objects are those of `fact_sets`; the values are made by seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from microvlm.bench.memory.fact_sets import QUESTIONS
from microvlm.bench.memory.memoryset_reader import load_memoryset
from microvlm.bench.memory.model_under_test import ModelUnderTest
from microvlm.bench.memory.open_values.fact_pool import ASKED, Pool, pictured_pool
from microvlm.bench.memory.open_values.pointed_queries import point_queries
from microvlm.bench.stats import wilson
from microvlm.memory.episodic import EpisodicMemory

COUNTS = (8, 32, 64)
STRANGER_COUNTS = (32, 64)
MORE_QUESTIONS = (
    ("where do i keep this?", "in which place is this?"),
    ("when did i get this?", "how long have i had this?"),
)
"""Beside `QUESTIONS`: the second wordings occur in no training of `nano`."""
DECODED = 128
"""Most questions of a row that the decoder answers too."""
STOP_TOKENS = 2
"""Tokens beyond the longest value's: the stop token, and a blank that a value may begin with."""
LENGTHS = ((1, 2), (3, 4), (5, 8), (9, 16), (17, 64))
"""Tokens of a value, of the curve of what the decoder says exactly."""
DECLINED = 0.05
"""The nearest key's threshold on its cosine declines this share of the questions whose nearest key is right."""


def open_value_scores(model: ModelUnderTest, most: int, seed: int = 0) -> dict[str, Any]:
    """Tables of at most `most` facts a question, in memories of `COUNTS` facts."""
    rng = np.random.default_rng(seed + 1)
    objects = load_memoryset()
    drawn = rng.permutation(len(objects.objects))[:most]
    pictures = [objects.pixels(objects.objects[index].file) for index in drawn]
    pool = pictured_pool(model, pictures, (*QUESTIONS, *MORE_QUESTIONS), rng)
    groups = {count: _groups(pool, count, rng) for count in COUNTS if count <= len(pictures)}
    rows, decoded = [], []
    for count, parts in groups.items():
        memories = [pool.remember(model, part) for part in parts]
        for how in ASKED:
            row, said = _recall(model, pool, parts, memories, how)
            rows.append({"facts": count, "asked": how, **row})
            decoded += said
    strangers = [
        _strangers(model, pool, count, rng) for count in STRANGER_COUNTS if 2 * count <= len(pictures)
    ]
    return {"rows": rows, "strangers": strangers, "decoder_by_length": _by_length(model, decoded)}


def _groups(pool: Pool, count: int, rng: np.random.Generator) -> list[list[int]]:
    """Memories of `count` facts, all of one question, of every fact of the pool as far as they come out even."""
    groups = []
    for relation in np.unique(pool.relations):
        facts = rng.permutation(np.flatnonzero(pool.relations == relation))
        groups += [
            [int(fact) for fact in facts[start : start + count]]
            for start in range(0, len(facts) - count + 1, count)
        ]
    return groups


def _recall(
    model: ModelUnderTest,
    pool: Pool,
    parts: Sequence[list[int]],
    memories: Sequence[EpisodicMemory],
    how: str,
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(one row, the decoder's (value, answer) pairs)."""
    pointing = model.runtime.config.memory.pointing
    right = wrong = nearest = total = 0
    decoded: list[tuple[str, str]] = []
    for part, memory in zip(parts, memories, strict=True):
        queries, places = pool.encoded[how].rows(np.array(part)), np.arange(len(part))
        pointed = point_queries(model, memory, queries)
        entries, _, said = pointed.surest(pointing)
        right += int((said & (entries == places)).sum())
        wrong += int((said & (entries != places)).sum())
        nearest += sum(
            int(memory.nearest(key)[0] == place) for key, place in zip(queries.key, places, strict=True)
        )
        total += len(part)
        asked = part[: max(1, DECODED // len(parts))]
        # As the model reads them: it cannot say a capital that it never reads.
        values = [model.processor.normalize_text(pool.values[fact]) for fact in asked]
        longest = max(len(model.processor.text_ids(value)) for value in values)
        answers = model.answers(
            [pool.queries[how][fact] for fact in asked], memory.states, longest + STOP_TOKENS
        )
        decoded += zip(values, answers, strict=True)
    exact = sum(value == answer for value, answer in decoded)
    row = {
        "trials": total,
        "right": right / total,
        "right_ci95": wilson(right, total),
        "wrong": wrong / total,
        "wrong_ci95": wilson(wrong, total),
        "not_found": (total - right - wrong) / total,
        "nearest_key": nearest / total,
        "decoder_trials": len(decoded),
        "decoder": exact / len(decoded),
    }
    return row, decoded


def _strangers(model: ModelUnderTest, pool: Pool, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """Pictures never told of, under the one question of all facts: the shares that get a text.

    The nearest key and the scope detector say no text alone: a stranger is let in above their threshold.
    """
    pointing, scope_threshold = (
        getattr(model.runtime.config.memory, name) for name in ("pointing", "scope_threshold")
    )
    let_in, by_key, by_scope, total = 0, 0, 0, 0
    known_cosines: list[float] = []
    stranger_cosines: list[float] = []
    for relation in np.unique(pool.relations):
        facts = [int(fact) for fact in rng.permutation(np.flatnonzero(pool.relations == relation))]
        told, others = facts[:count], facts[count:]
        memory = pool.remember(model, told)
        queries = pool.encoded["view"]
        pointed = point_queries(model, memory, queries.rows(np.array(others)))
        let_in += int(pointed.surest(pointing).is_said.sum())
        for place, fact in enumerate(told):
            row, cosine = memory.nearest(queries.key[fact])
            known_cosines += [cosine] if row == place else []
        stranger_cosines += [memory.nearest(key)[1] for key in queries.key[others]]
        readings = model.readings([pool.queries["view"][fact] for fact in others], memory.states)
        by_scope += int(sum((reading.scope >= scope_threshold).sum() for reading in readings))
        total += len(others)
    threshold = float(np.quantile(known_cosines, DECLINED)) if known_cosines else 1.0
    by_key = int((np.array(stranger_cosines) >= threshold).sum())
    return {
        "facts": count,
        "strangers": total,
        "let_in": let_in / total,
        "let_in_ci95": wilson(let_in, total),
        "nearest_key": by_key / total,
        "decoder": by_scope / total,
    }


def _by_length(model: ModelUnderTest, decoded: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Exact answers of the decoder by the number of tokens that the value has."""
    lengths = np.array([len(model.processor.text_ids(value)) for value, _ in decoded])
    is_exact = np.array([value == answer for value, answer in decoded])
    rows = []
    for least, most in LENGTHS:
        of_length = is_exact[(lengths >= least) & (lengths <= most)] if len(decoded) else is_exact
        if len(of_length):
            exact = int(of_length.sum())
            rows.append(
                {
                    "tokens": f"{least}-{most}",
                    "values": len(of_length),
                    "exact": exact / len(of_length),
                    "exact_ci95": wilson(exact, len(of_length)),
                }
            )
    return rows
