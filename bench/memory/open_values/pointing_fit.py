"""Fits the confidence of a model's readings, on pictures that the caller gives, or else on the evaluation set's.

With a folder of pictures no table of the bench uses what it is fitted on; without one the tables of concepts and of the
stream of writes show the same drawings, in other views. Half of the pictures and of the facts without one fit the
weights, the other half chooses the threshold. Questions come from memories of 1 to 256 facts: asked as they were
written, with another view, in another wording and both; and, as strangers, about pictures never told of, with questions
never asked of a known picture, and without a picture.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from microvlm.atomic import write_file
from microvlm.bench.evalset_reader import load_evalset, read_drawing
from microvlm.bench.memory.model_under_test import ModelUnderTest
from microvlm.bench.memory.open_values.fact_pool import ASKED, NO_PICTURE, Pool, pictured_pool, text_pool
from microvlm.bench.memory.open_values.pointed_queries import PointedQueries, point_queries
from microvlm.bench.speed.harness import Progress
from microvlm.config import CONFIG, MicroVLMConfig
from microvlm.configuration.pointing import EVIDENCE, PointingConfig, PointingWeights
from microvlm.errors import UserError
from microvlm.formats.bundle import is_bundle
from microvlm.memory.ordinal_questions import ORDINALS, ordinal_question
from microvlm.memory.pointing.confidence import confidence_of

LEAST_PICTURES, PICTURES = 16, 128
"""Least and most pictures of the fit; half of them choose the threshold."""
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUESTIONS_A_KIND = 64
QUERIES_A_COUNT = 600
"""About how many questions of each number of facts."""
MOST_LET_IN = 0.05
"""The threshold lets in at most this share of the strangers of any kind."""
MOST_WRONG = 0.01
"""And gives at most this share of wrong texts to questions that have an answer."""
RIDGE = 1e-3
IMAGE_QUESTIONS = (
    ("who does this belong to?", "who is the owner of this?"),
    ("who gave me this?", "from whom is this?"),
    ("where did i put this?", "in what place do i keep this?"),
    ("where did i get this?", "in what shop did i buy this?"),
    ("when did i get this?", "on what day did i get this?"),
    ("what do i call this?", "what was its name again?"),
    ("what is the code of this?", "what code belongs to this?"),
    ("how much did this cost?", "at what price did i buy this?"),
    ("what is this for?", "for what purpose do i use this?"),
    ("when do i have to bring this back?", "when is this due?"),
)
"""Of the second wordings, no training of `photo` saw the like."""
_THING_NAMES = """
wifi garage alarm bicycle locker suitcase gate safe email laptop phone bank library gym office cellar car boat printer
router radio lift fridge scooter
"""
_THINGS = tuple(_THING_NAMES.split())
_PROPERTIES = ("code", "password", "number", "key", "colour", "owner", "place", "date")
_CALIBRATION_BINS = 15


class Sample(NamedTuple):
    """Questions of one kind, all to memories of one number of facts."""

    kind: str
    """Of `ASKED`, or of a stranger."""
    facts: int
    pointed: PointedQueries
    answers: np.ndarray
    """int [N], index of the entry that answers; -2 where none does."""

    @property
    def is_known(self) -> bool:
        return bool((self.answers >= 0).any())

    def readings(self) -> tuple[np.ndarray, np.ndarray]:
        """(evidence [R, ...], whether the entry answers [R]) of every reading that points at an entry."""
        points = self.pointed.entries >= 0
        return self.pointed.evidence[points], (self.pointed.entries == self.answers[:, None])[points]


def fit_pointing(
    model: ModelUnderTest, seed: int = 0, folder: Path | None = None, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Fit the weights and choose the threshold -> `pointing` (a PointingConfig) and what it does to the second half.

    The pictures are those in `folder`, or the evaluation set's drawings. Raises UserError for too few.
    """
    rng = np.random.default_rng(seed)
    pictures = _pictures(folder, rng)
    progress(f"encoding facts about {len(pictures)} pictures")
    halves = [_pool(model, part, texts, rng) for part, texts in zip(*_halves(pictures, rng), strict=True)]
    progress("filling memories")
    fitted, held_out = (_samples(model, pool, rng) for pool in halves)
    weights = fit_weights(fitted)
    threshold = choose_threshold(held_out, weights, model.slots)
    return {
        "pointing": PointingConfig(threshold, weights),
        "calibration_error": round(calibration_error(held_out, weights), 4),
        "kinds": shares_by_kind(held_out, weights, threshold),
    }


def check_writable(checkpoint: Path) -> None:
    """Raise UserError for what is no checkpoint, and for a bundle, whose files are hashed."""
    if is_bundle(checkpoint):
        raise UserError(f"{checkpoint} is a bundle: fit its checkpoint and export it again.")
    MicroVLMConfig.load(checkpoint)


def write_pointing(checkpoint: Path, pointing: PointingConfig) -> None:
    """Write the numbers into a checkpoint's config.json. Raises UserError and OSError."""
    config = MicroVLMConfig.load(checkpoint)
    memory = dataclasses.replace(config.memory, pointing=pointing)
    text = json.dumps(dataclasses.replace(config, memory=memory).to_dict(), indent=2)
    write_file(checkpoint / CONFIG, text + "\n")


def fit_weights(samples: Sequence[Sample]) -> PointingWeights:
    """Ridge logistic regression by Newton's method; every kind at every number of facts has the same weight."""
    rows, right, weight = _weighted(samples)
    mean = weight @ rows
    deviation = np.sqrt(weight @ (rows - mean) ** 2) + 1e-6
    inputs = np.column_stack([(rows - mean) / deviation, np.ones(len(rows))])
    ridge = RIDGE * np.diag([1.0] * len(EVIDENCE) + [1e-6])
    values = np.zeros(inputs.shape[1])
    for _ in range(50):
        chance = 1 / (1 + np.exp(-np.clip(inputs @ values, -30, 30)))
        slope = inputs.T @ (weight * (chance - right)) + ridge @ values
        curve = (inputs * (weight * chance * (1 - chance))[:, None]).T @ inputs + ridge
        values -= np.linalg.solve(curve, slope)
    scaled = values[:-1] / deviation
    numbers = [round(float(value), 4) for value in (*scaled, values[-1] - scaled @ mean)]
    return PointingWeights(*np.clip(numbers, -1e4, 1e4).tolist())


def choose_threshold(samples: Sequence[Sample], weights: PointingWeights, slots: int) -> float:
    """The least threshold, in hundredths, at which `MOST_LET_IN` and `MOST_WRONG` hold; at most .95.

    Wrong texts are counted in memories of at most `slots` facts, whose state is not chosen by the question.
    """
    small = [sample for sample in samples if sample.facts <= slots]
    for threshold in np.arange(0.3, 0.96, 0.01):
        let_in = [row["said"] for row in shares_by_kind(samples, weights, threshold) if not row["known"]]
        wrong = [row["wrong"] for row in shares_by_kind(small, weights, threshold) if row["known"]]
        if max(let_in, default=0) <= MOST_LET_IN and np.mean(wrong or [0]) <= MOST_WRONG:
            break
    return round(float(threshold), 2)


def shares_by_kind(
    samples: Sequence[Sample], weights: PointingWeights, threshold: float
) -> list[dict[str, Any]]:
    """By kind: of its questions, the shares with the right text, with a wrong one, and with any."""
    rows = []
    for kind in dict.fromkeys(sample.kind for sample in samples):
        of_kind = [sample for sample in samples if sample.kind == kind]
        surest = [sample.pointed.surest(weights) for sample in of_kind]
        said = np.concatenate([confidence >= threshold for _, confidence in surest])
        right = np.concatenate(
            [entry == sample.answers for (entry, _), sample in zip(surest, of_kind, strict=True)]
        )
        rows.append(
            {
                "kind": kind,
                "known": any(sample.is_known for sample in of_kind),
                "questions": len(said),
                "right": round(float((said & right).mean()), 4),
                "wrong": round(float((said & ~right).mean()), 4),
                "said": round(float(said.mean()), 4),
            }
        )
    return rows


def calibration_error(samples: Sequence[Sample], weights: PointingWeights) -> float:
    """Expected calibration error over 15 bins of equal mass, every kind at every number of facts counted alike."""
    rows, right, weight = _weighted(samples)
    confidence = confidence_of(rows, weights)
    order = np.argsort(confidence, kind="stable")
    bins = np.minimum((_CALIBRATION_BINS * np.cumsum(weight[order])).astype(int), _CALIBRATION_BINS - 1)
    gaps = weight[order] * (confidence[order] - right[order])
    return float(np.abs(np.bincount(bins, gaps, _CALIBRATION_BINS)).sum())


def _weighted(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(evidence [R, ...], right [R], weight [R]) of all readings; those of a kind at a number of facts weigh alike."""
    parts = [sample.readings() for sample in samples]
    # There are more memories of few facts than of many.
    alike = Counter((sample.kind, sample.facts) for sample in samples)
    weight = np.concatenate(
        [
            np.full(len(right), 1 / max(1, len(right)) / alike[sample.kind, sample.facts])
            for sample, (_, right) in zip(samples, parts, strict=True)
        ]
    )
    rows, right = (np.concatenate([part[number] for part in parts]) for number in (0, 1))
    return rows, right.astype(np.float64), weight / weight.sum()


def _pictures(folder: Path | None, rng: np.random.Generator) -> list[np.ndarray]:
    """At most `PICTURES` pictures of `folder`, or of the evaluation set. Raises UserError."""
    if folder is None:
        evalset = load_evalset()
        drawn = rng.permutation(len(evalset.images))[:PICTURES]
        return [evalset.pixels(evalset.images[index].file) for index in drawn]
    own = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if len(own) < LEAST_PICTURES:
        raise UserError(f"{folder} has fewer than {LEAST_PICTURES} pictures; give a folder with more.")
    return [read_drawing(own[index]) for index in rng.permutation(len(own))[:PICTURES]]


_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def _halves(
    pictures: Sequence[np.ndarray], rng: np.random.Generator
) -> tuple[list[list[np.ndarray]], list[list[tuple[str, str]]]]:
    texts = [
        (f"what is the {name} of the {thing}?", f"what is the {thing} {name}?")
        for thing in _THINGS
        for name in _PROPERTIES
    ]
    texts = [texts[index] for index in rng.permutation(len(texts))]
    order = rng.permutation(len(pictures))
    return (
        [[pictures[index] for index in order[half::2]] for half in (0, 1)],
        [texts[half::2] for half in (0, 1)],
    )


def _pool(
    model: ModelUnderTest,
    pictures: Sequence[np.ndarray],
    texts: Sequence[tuple[str, str]],
    rng: np.random.Generator,
) -> Pool:
    caption = model.runtime.config.prompt.caption_prompt
    pool = pictured_pool(model, pictures, (*IMAGE_QUESTIONS, (caption, caption)), rng)
    ordinals = [(ordinal_question(place), ordinal_question(place)) for place in range(len(ORDINALS))]
    return pool.joined(text_pool(model, texts, 0, rng)).joined(text_pool(model, ordinals, 0, rng))


def _samples(model: ModelUnderTest, pool: Pool, rng: np.random.Generator) -> list[Sample]:
    """Questions to memories of each of `COUNTS`."""
    samples: list[Sample] = []
    for count in COUNTS:
        if 2 * count > len(pool.values):
            break
        for number in range(max(4, min(40, QUERIES_A_COUNT // (8 * count)))):
            told = _facts(pool, count, number % 4, rng)
            memory = pool.remember(model, told)
            for kind, how, asked in _questions(pool, np.array(told), rng):
                if not len(asked):
                    continue
                pointed = point_queries(model, memory, pool.keys[how][asked], pool.latents[how][asked])
                answers = np.array([told.index(fact) if fact in told else -2 for fact in asked.tolist()])
                samples.append(Sample(kind, count, pointed, answers))
    return samples


def _questions(
    pool: Pool, told: np.ndarray, rng: np.random.Generator
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(kind, how they are asked, at most `QUESTIONS_A_KIND` facts): of the facts `told`, and of strangers."""
    order = rng.permutation(told)
    has_picture = pool.pictures[order] != NO_PICTURE
    for how in ASKED:
        yield how, how, order[has_picture][:QUESTIONS_A_KIND]
    for name, how in (("text", "same"), ("text, wording", "wording")):
        yield name, how, order[~has_picture][:QUESTIONS_A_KIND]
    others = rng.permutation(np.setdiff1d(np.arange(len(pool.values)), told))
    has_picture = pool.pictures[others] != NO_PICTURE
    is_known_picture = np.isin(pool.pictures[others], pool.pictures[told]) & has_picture
    is_known_question = np.isin(pool.relations[others], pool.relations[told])
    another_picture = others[has_picture & ~is_known_picture & is_known_question]
    yield "stranger, another picture", "view", another_picture[:QUESTIONS_A_KIND]
    yield "stranger, another question", "view", others[is_known_picture][:QUESTIONS_A_KIND]
    yield "stranger, no picture", "same", others[~has_picture][:QUESTIONS_A_KIND]


def _facts(pool: Pool, count: int, mode: int, rng: np.random.Generator) -> list[int]:
    """Facts of a memory: one question about many pictures, four questions, with facts without a picture, or these."""
    relations = np.unique(pool.relations[pool.pictures != NO_PICTURE])
    plain = rng.permutation(np.flatnonzero(pool.pictures == NO_PICTURE))
    asked = rng.permutation(relations)[: 1 if mode == 0 else 4]
    pictured = rng.permutation(np.flatnonzero((pool.pictures != NO_PICTURE) & np.isin(pool.relations, asked)))
    texts = {0: 0, 1: 0, 2: count // 2, 3: count}[mode]
    facts = [*plain[:texts], *pictured[: count - min(texts, len(plain))]]
    rest = rng.permutation(np.setdiff1d(np.arange(len(pool.values)), facts))
    return [int(fact) for fact in rng.permutation([*facts, *rest[: count - len(facts)]])]
