"""Fits the confidence of a model's readings, on pictures that the caller gives, or else on the evaluation set's.

With a folder of pictures no table of the bench uses what it is fitted on; without one the tables of concepts and of the
stream of writes show the same drawings, in other views. Half of the pictures and of the facts without one fit the
weights, the other half chooses the thresholds. Of a query with a picture, one regression says whether the entry is
about that picture and one whether it answers that question; of others, one says whether it answers. Questions come from
memories of 1 to 256 facts: asked as they were written, with another view, in another wording and both; and, as
strangers, about pictures never told of, with questions never asked of a known picture, without the picture, and about
other things than pictures.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from microvlm.atomic import write_file
from microvlm.bench.evalset_reader import load_evalset, read_drawing
from microvlm.bench.memory.model_under_test import ModelUnderTest
from microvlm.bench.memory.open_values.fact_pool import ASKED, NO_PICTURE, Pool, pictured_pool, text_pool
from microvlm.bench.memory.open_values.pointed_queries import PointedQueries, point_queries
from microvlm.bench.memory.open_values.pointing_regression import (
    Sample,
    calibration_error,
    fit_maps,
    shares_by_kind,
)
from microvlm.bench.speed.harness import Progress
from microvlm.config import CONFIG, MicroVLMConfig
from microvlm.configuration.pointing import PointingConfig
from microvlm.errors import UserError
from microvlm.formats.bundle import is_bundle
from microvlm.memory.ordinal_questions import ORDINALS, ordinal_question

LEAST_PICTURES, PICTURES = 16, 256
"""Least and most pictures of the fit; half of them choose the threshold."""
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUESTIONS_A_KIND = 64
QUERIES_A_COUNT = 600
"""About how many questions of each number of facts."""
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
SEEN_QUESTIONS = (
    "what is this?",
    "is this a dog?",
    "which colour is the ground?",
    "how many are there?",
    "what is on the left?",
    "is it raining?",
    "what do you see?",
    "when was this taken?",
)
"""Questions about what a picture shows, which no fact of the fit answers."""
_THING_NAMES = """
wifi garage alarm bicycle locker suitcase gate safe email laptop phone bank library gym office cellar car boat printer
router radio lift fridge scooter
"""
_THINGS = tuple(_THING_NAMES.split())
_PROPERTIES = ("code", "password", "number", "key", "colour", "owner", "place", "date")


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
    pointing = fit_maps(fitted, held_out, model.slots)
    return {
        "pointing": pointing,
        "calibration_error": round(calibration_error(held_out, pointing), 4),
        "kinds": shares_by_kind(held_out, pointing),
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
    seen = tuple((question, question) for question in SEEN_QUESTIONS)
    pool = pictured_pool(model, pictures, (*IMAGE_QUESTIONS, (caption, caption), *seen), rng)
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
                pointed = point_queries(model, memory, pool.encoded[how].rows(asked))
                samples.append(_sample(pool, kind, pointed, np.array(told), asked, how == "words"))
    return samples


def _sample(
    pool: Pool, kind: str, pointed: PointedQueries, told: np.ndarray, asked: np.ndarray, without_picture: bool
) -> Sample:
    """The queries of facts `asked` to a memory of the facts `told`."""
    places = {fact: place for place, fact in enumerate(told.tolist())}
    answers = np.array([-2 if without_picture else places.get(fact, -2) for fact in asked.tolist()])
    pictures, relations = pool.pictures[told][pointed.entries], pool.relations[told][pointed.entries]
    return Sample(
        kind,
        len(told),
        pointed,
        answers,
        pictures == pool.pictures[asked][:, None],
        (relations == pool.relations[asked][:, None]) & (pictures != NO_PICTURE),
    )


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
    one = ""
    if len(np.unique(pool.relations[told])) == 1:
        # Only the picture tells what was told from what was not: a drawing among photographs would be told at once.
        # Each kind is held to the bound by itself: drawings look more alike than photographs.
        is_drawing = pool.is_drawing[told[0]]
        one = f", one question, {'drawings' if is_drawing else 'photographs'}"
        another_picture = another_picture[pool.is_drawing[another_picture] == is_drawing]
    yield f"stranger, another picture{one}", "view", another_picture[:QUESTIONS_A_KIND]
    is_seen = _is_seen(pool)[others]
    # A person asks about the picture at hand: its own view is the harder one for the question.
    for kind, chosen in (("another question", ~is_seen), ("what is seen", is_seen)):
        asked = others[is_known_picture & chosen]
        yield f"stranger, {kind}", "view", asked[:QUESTIONS_A_KIND]
        yield f"stranger, {kind}, same picture", "same", asked[:QUESTIONS_A_KIND]
    yield "stranger, picture left out", "words", order[pool.pictures[order] != NO_PICTURE][:QUESTIONS_A_KIND]
    yield "stranger, no picture", "same", others[~has_picture][:QUESTIONS_A_KIND]


def _facts(pool: Pool, count: int, mode: int, rng: np.random.Generator) -> list[int]:
    """Facts of a memory: one question about many pictures, four questions, with facts without a picture, or these."""
    can_be_told = ~_is_seen(pool)
    relations = np.unique(pool.relations[(pool.pictures != NO_PICTURE) & can_be_told])
    plain = rng.permutation(np.flatnonzero(pool.pictures == NO_PICTURE))
    asked = rng.permutation(relations)[: 1 if mode == 0 else 4]
    of_kind = (pool.pictures != NO_PICTURE) & np.isin(pool.relations, asked)
    if mode == 0:
        # Drawings alone or photographs alone, of which there must be strangers too.
        alike = [of_kind & (pool.is_drawing == kind) for kind in (True, False)]
        enough = [each for each in alike if each.sum() > count] or [of_kind]
        of_kind = enough[int(rng.integers(len(enough)))]
    pictured = rng.permutation(np.flatnonzero(of_kind))
    texts = {0: 0, 1: 0, 2: count // 2, 3: count}[mode]
    facts = [*plain[:texts], *pictured[: count - min(texts, len(plain))]]
    rest = rng.permutation(np.setdiff1d(np.flatnonzero(can_be_told), facts))
    return [int(fact) for fact in rng.permutation([*facts, *rest[: count - len(facts)]])]


def _is_seen(pool: Pool) -> np.ndarray:
    """bool [N]: whether a fact of the pool asks what its picture shows."""
    return np.array([question in SEEN_QUESTIONS for question, _ in pool.queries["same"]])
