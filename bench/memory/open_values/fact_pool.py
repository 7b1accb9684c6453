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
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.pointing.encoded_query import EncodedQuery, joined

ASKED = ("same", "view", "wording", "view and wording")
"""How a fact is asked for: as it was written, with another view of its picture, in another wording, with both."""
NO_PICTURE = -1


@dataclass(frozen=True)
class Pool:
    """N facts."""

    pictures: np.ndarray
    """int [N], the fact's picture or `NO_PICTURE`."""
    is_drawing: np.ndarray
    """bool [N], whether that picture is a drawing on white."""
    relations: np.ndarray
    """int [N]: facts of one number ask the same, of different things."""
    values: list[str]
    queries: dict[str, list[Query]]
    """By `ASKED`; facts without a picture are the same in another view."""
    encoded: dict[str, EncodedQuery]
    """By `ASKED`, and as "words": without the picture, as no fact about one is asked for."""
    turns: np.ndarray
    """Latents of questions with their values, float32 [N, C]."""

    def remember(self, model: ModelUnderTest, facts: Sequence[int]) -> EpisodicMemory:
        """A memory of some facts; an entry's text is its value."""
        memory = EpisodicMemory.empty(model.runtime)
        for fact in facts:
            entry = Entry(
                self.values[fact],
                latent=self.turns[fact],
                time=0.0,
                value_start=0,
                **self.encoded["same"].rows(np.array([fact])).entry_arrays(),
            )
            memory.write(model.runtime, entry)
        return memory

    def joined(self, other: Pool) -> Pool:
        """The facts of both; the other's pictures and relations get numbers of their own."""
        moved = np.where(other.pictures < 0, NO_PICTURE, other.pictures + self.pictures.max(initial=0) + 1)
        return Pool(
            np.concatenate([self.pictures, moved]),
            np.concatenate([self.is_drawing, other.is_drawing]),
            np.concatenate([self.relations, other.relations + self.relations.max(initial=0) + 1]),
            self.values + other.values,
            {how: self.queries[how] + other.queries[how] for how in ASKED},
            {how: joined([self.encoded[how], other.encoded[how]]) for how in self.encoded},
            np.concatenate([self.turns, other.turns]),
        )


def pictured_pool(
    model: ModelUnderTest,
    pictures: Sequence[np.ndarray],
    questions: Sequence[tuple[str, str]],
    rng: np.random.Generator,
) -> Pool:
    """A fact for every picture, uint8 [S, S, 3], and every (question, other wording)."""
    drawings = np.array([is_on_white(picture) for picture in pictures])
    views = [_two_views(picture, pictures[index - 1], rng) for index, picture in enumerate(pictures)]
    facts = [(number, relation) for relation in range(len(questions)) for number in range(len(pictures))]
    queries: dict[str, list[Query]] = {
        how: [
            (questions[relation]["wording" in how], views[number]["view" in how])
            for number, relation in facts
        ]
        for how in ASKED
    }
    numbers, relations = (np.array(part) for part in zip(*facts, strict=True))
    return _encoded(model, queries, numbers, drawings[numbers], relations, rng)


def text_pool(
    model: ModelUnderTest, questions: Sequence[tuple[str, str]], relation: int, rng: np.random.Generator
) -> Pool:
    """A fact without a picture for every (question, other wording)."""
    queries: dict[str, list[Query]] = {
        how: [(pair["wording" in how], None) for pair in questions] for how in ASKED
    }
    count = len(questions)
    nothing = np.full(count, NO_PICTURE)
    return _encoded(model, queries, nothing, np.zeros(count, bool), np.full(count, relation), rng)


def _encoded(
    model: ModelUnderTest,
    queries: dict[str, list[Query]],
    pictures: np.ndarray,
    is_drawing: np.ndarray,
    relations: np.ndarray,
    rng: np.random.Generator,
) -> Pool:
    values = open_values(len(pictures), rng)
    encoder = QueryEncoder(model)
    encoded = {how: joined([encoder.query(query) for query in queries[how]]) for how in ASKED}
    encoded["words"] = joined([encoder.query((question, None)) for question, _ in queries["same"]])
    turns = [encoder.turn(query, value) for query, value in zip(queries["same"], values, strict=True)]
    return Pool(pictures, is_drawing, relations, values, queries, encoded, np.concatenate(turns))


class QueryEncoder:
    """Encodes questions one at a time, as a user asks them; each picture, and each part of a query, once."""

    def __init__(self, model: ModelUnderTest):
        self._model = model
        self._features: dict[int, np.ndarray] = {}
        self._encoded: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def query(self, query: Query) -> EncodedQuery:
        """As `encode_query`, batch 1."""
        question, picture = query
        latent, key = self._latent_and_key(query)
        if picture is None:
            return EncodedQuery(key, latent, np.zeros_like(key), key)
        caption = self._model.runtime.config.prompt.caption_prompt
        _, picture_key = self._latent_and_key((caption, picture))
        _, question_key = self._latent_and_key((question, None))
        return EncodedQuery(key, latent, picture_key, question_key)

    def turn(self, query: Query, value: str) -> np.ndarray:
        """Latent of a question with its value, [1, C]."""
        prompt = self._model.prompt_with_features(*query, self._features)
        latent, _ = self._model.runtime.memory_encode(*self._model.with_answers(prompt, [value]))
        return np.array(latent)

    def _latent_and_key(self, query: Query) -> tuple[np.ndarray, np.ndarray]:
        name = query[0], id(query[1])
        if name not in self._encoded:
            prompt = self._model.prompt_with_features(*query, self._features)
            latent, key = self._model.runtime.memory_encode(*prompt)
            self._encoded[name] = np.array(latent), np.array(key)
        return self._encoded[name]


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
