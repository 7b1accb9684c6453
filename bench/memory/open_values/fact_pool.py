"""A pool of facts about pictures and of facts without any, encoded once, from which memories are filled.

Knows which picture and which question a fact has, and nothing of how well it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from microvlm.bench.memory.fact_sets import WHITE_TOLERANCE, another_view
from microvlm.bench.memory.model_under_test import ModelUnderTest, Query
from microvlm.bench.memory.open_values.values import open_values
from microvlm.generation import Prompt
from microvlm.memory.episodic import Entry, EpisodicMemory

ASKED = ("same", "view", "wording", "view and wording")
"""How a fact is asked for: as it was written, with another view of its picture, in another wording, with both."""
NO_PICTURE = -1


@dataclass(frozen=True)
class Pool:
    """N facts. Latents are float32 [N, C], keys [N, K]."""

    pictures: np.ndarray
    """int [N], the fact's picture or `NO_PICTURE`."""
    relations: np.ndarray
    """int [N]: facts of one number ask the same, of different things."""
    values: list[str]
    queries: dict[str, list[Query]]
    """By `ASKED`; facts without a picture are the same in another view."""
    latents: dict[str, np.ndarray]
    keys: dict[str, np.ndarray]
    turns: np.ndarray
    """Latents of questions with their values."""

    def remember(self, model: ModelUnderTest, facts: Sequence[int]) -> EpisodicMemory:
        """A memory of some facts; an entry's text is its value."""
        memory = EpisodicMemory.empty(model.runtime)
        for fact in facts:
            entry = Entry(
                self.values[fact],
                self.keys["same"][fact],
                self.turns[fact],
                time=0.0,
                value_start=0,
                cue=self.latents["same"][fact],
            )
            memory.write(model.runtime, entry)
        return memory

    def joined(self, other: Pool) -> Pool:
        """The facts of both; the other's pictures and relations get numbers of their own."""
        moved = np.where(other.pictures < 0, NO_PICTURE, other.pictures + self.pictures.max(initial=0) + 1)
        return Pool(
            np.concatenate([self.pictures, moved]),
            np.concatenate([self.relations, other.relations + self.relations.max(initial=0) + 1]),
            self.values + other.values,
            {how: self.queries[how] + other.queries[how] for how in ASKED},
            {how: np.concatenate([self.latents[how], other.latents[how]]) for how in ASKED},
            {how: np.concatenate([self.keys[how], other.keys[how]]) for how in ASKED},
            np.concatenate([self.turns, other.turns]),
        )


def pictured_pool(
    model: ModelUnderTest,
    pictures: Sequence[np.ndarray],
    questions: Sequence[tuple[str, str]],
    rng: np.random.Generator,
) -> Pool:
    """A fact for every picture, uint8 [S, S, 3], and every (question, other wording)."""
    views = [_two_views(picture, pictures[index - 1], rng) for index, picture in enumerate(pictures)]
    facts = [(number, relation) for relation in range(len(questions)) for number in range(len(pictures))]
    queries: dict[str, list[Query]] = {
        how: [
            (questions[relation]["wording" in how], views[number]["view" in how])
            for number, relation in facts
        ]
        for how in ASKED
    }
    return _encoded(model, queries, [number for number, _ in facts], [relation for _, relation in facts], rng)


def text_pool(
    model: ModelUnderTest, questions: Sequence[tuple[str, str]], relation: int, rng: np.random.Generator
) -> Pool:
    """A fact without a picture for every (question, other wording)."""
    queries: dict[str, list[Query]] = {
        how: [(pair["wording" in how], None) for pair in questions] for how in ASKED
    }
    count = len(questions)
    return _encoded(model, queries, [NO_PICTURE] * count, [relation] * count, rng)


def _encoded(
    model: ModelUnderTest,
    queries: dict[str, list[Query]],
    pictures: list[int],
    relations: list[int],
    rng: np.random.Generator,
) -> Pool:
    values = open_values(len(pictures), rng)
    features: dict[int, np.ndarray] = {}
    encoded = {how: _encode(model, queries[how], features) for how in ASKED}
    turns, _ = _encode(model, queries["same"], features, values)
    latents, keys = ({how: encoded[how][part] for how in ASKED} for part in (0, 1))
    return Pool(np.array(pictures), np.array(relations), values, queries, latents, keys, turns)


def _encode(
    model: ModelUnderTest,
    queries: Sequence[Query],
    features: dict[int, np.ndarray],
    values: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(latents, keys) of questions, or of questions with values; one at a time, as a user asks them.

    `features` keeps those of each picture, which is encoded once.
    """
    latents, keys = [], []
    for number, (question, picture) in enumerate(queries):
        prompt = model.prompt_with_features(question, picture, features)
        if values is not None:
            prompt = Prompt(*model.with_answers(prompt, [values[number]]))
        latent, key = model.runtime.memory_encode(*prompt)
        latents.append(np.array(latent[0]))
        keys.append(np.array(key[0]))
    return np.array(latents), np.array(keys)


def _two_views(
    picture: np.ndarray, neighbour: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two views of a drawing on white, as `another_view` makes them, or of a photograph."""
    if is_on_white(picture):
        first, second = (another_view(picture, neighbour, rng) for _ in range(2))
        return first, second
    return picture, _photographed_again(picture, rng)


def is_on_white(picture: np.ndarray) -> bool:
    """Whether the corners of a picture are white, as those of a drawing are."""
    corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]]
    return bool((corners >= 255 - WHITE_TOLERANCE).all())


def _photographed_again(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Nine tenths to two thirds of a photograph, lighter or darker."""
    height, width = picture.shape[:2]
    share = rng.uniform(2 / 3, 0.9)
    rows, columns = round(height * share), round(width * share)
    top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
    part = picture[top : top + rows, left : left + columns].astype(np.float64)
    return np.clip(part * rng.uniform(0.8, 1.2), 0, 255).astype(np.uint8)
