"""Batches of facts in memories, of the strangers to them, and of how both are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from microvlm.config import MicroVLMConfig
from microvlm.training.batches.sample_texts import IGNORED, TextRows
from microvlm.training.photo.batches.open_facts import SEEN_KINDS, FactSampler, Query
from microvlm.training.photo.data.builder import VIEWS
from microvlm.training.photo.data.photo_data import PhotoData
from microvlm.training.photo.language.question_forms import MEMORY_KINDS, Split

SAID = 16
"""Most facts whose value the decoder says."""
BRIGHTER, CHANNELS_HIDDEN, WINDOWS_HIDDEN, OTHERS_HIDDEN = 0.15, 0.1, 0.25, 0.2
"""How much brighter or darker features are made; the share of their channels that each picture loses; chances that a
row does not see a window, and the whole picture or the spelled name. A few thousand pictures with four views each are
else learnt by heart: keys of known things agree, and those of others as little as before."""


TOKENS_HIDDEN = 0.1
"""Share of a question's tokens that a row does not see: wordings are else known by one word of them."""
WORDINGS, SUBJECTS = 2, 12
"""Pairs of wordings of each kind of question, and subjects of questions without a picture, in a batch of words."""


class Rows(NamedTuple):
    """Token rows, with a picture each or none."""

    ids: Tensor
    """int64 [R, S], padded on the right."""
    mask: Tensor
    pictures: Tensor
    """int64 [R], the row of the picture in the features of the batch; -1 for none."""


class MemoryBatch(NamedTuple):
    """Facts of memories of one size, and strangers."""

    features: Tensor
    """uint8 [P, F, S, S]."""
    factors: Tensor
    """float32 [P, F], by which the features are multiplied."""
    written: Rows
    """The question of each fact, with a view of its picture."""
    full: Rows
    """The same with the value."""
    asked: Rows
    """Another view, other words: the facts, and then as many strangers."""
    pictures: tuple[Rows, Rows]
    """Two views of each different picture of the facts, under the captioning prompt."""
    words: tuple[Rows, Rows]
    """Two wordings each of questions without a picture."""
    meanings: Tensor
    """int64 [rows of `words`], equal where two rows ask the same."""
    values: Tensor
    """int64 [n <= SAID, T], the values of the first facts, padded with IGNORED."""
    size: int


class MemorySampler:
    """Draws batches of one part of a folder that has views of things."""

    def __init__(
        self, data: PhotoData, rows: TextRows, config: MicroVLMConfig, part: str, split: Split, hides: bool
    ):
        """`hides` says whether some of what is seen of pictures is hidden, in training."""
        self.data, self.rows, self.vision, self.part, self.hides = data, rows, config.vision, part, hides
        self.prefix_tokens = config.prefix_tokens
        shown = data.descriptions(part)
        # Views of a thing that was drawn twice are taken once.
        self.things = list({shown[row].source: row for row in range(0, len(shown), VIEWS)}.values())
        """The row of the first view of each thing."""
        names = [shown[row].things[0].name if len(shown[row].things) == 1 else None for row in self.things]
        self._facts = FactSampler(names, config.prompt.caption_prompt, split)

    def draw(self, rng: np.random.Generator, facts_in_all: int, size: int) -> MemoryBatch:
        """Memories of `size` facts each, and as many strangers."""
        sampler = self._facts
        memories = [sampler.facts(size, rng) for _ in range(facts_in_all // size)]
        strangers = [query for facts in memories for query in sampler.strangers(facts, size, rng)]
        facts = [fact for memory in memories for fact in memory]
        pictures: dict[tuple[int, int], int] = {}

        def view(thing: int, number: int) -> int:
            return -1 if thing < 0 else pictures.setdefault((thing, number), len(pictures))

        numbers = rng.integers(VIEWS, size=len(facts))
        first = [view(fact.query.thing, int(number)) for fact, number in zip(facts, numbers, strict=True)]
        questions = [sampler.ask(fact.query, rng) for fact in facts]
        written = self._rows(questions, first)
        full = self._rows(questions, first, [fact.value for fact in facts])
        queries = [fact.query for fact in facts] + strangers
        # Another view than the one that the fact was written with; any of a stranger's.
        moved = (np.resize(numbers, len(queries)) + 1 + rng.integers(VIEWS - 1, size=len(queries))) % VIEWS
        others = [view(query.thing, int(number)) for query, number in zip(queries, moved, strict=True)]
        asked = self._rows([sampler.ask(query, rng) for query in queries], others)
        alone = list(
            {fact.query.thing: row for row, fact in enumerate(facts) if fact.query.thing >= 0}.values()
        )
        captions = [self._facts.caption_prompt] * len(alone)
        pictures_alone = (
            self._rows(captions, [first[row] for row in alone]),
            self._rows(captions, [others[row] for row in alone]),
        )
        words, meanings = self._words(rng)
        rows = np.array([self.things[thing] + number for thing, number in pictures])
        features = torch.from_numpy(self.data.features(self.part, rows))
        factors = torch.ones(features.shape[:2])
        if self.hides:
            factors *= torch.from_numpy(rng.uniform(1 - BRIGHTER, 1 + BRIGHTER, (len(rows), 1))).float()
            hidden = torch.from_numpy(rng.random(factors.shape) < CHANNELS_HIDDEN)
            # A feature of 0 is absent; a colour of 0 would be black.
            hidden[:, self.vision.hidden_size :] = False
            factors[hidden] = 0.0
            for queries_of in (written, full, asked, *pictures_alone):
                self._hide(queries_of, rng)
            for queries_of in (written, asked, *words):
                self._hide_tokens(queries_of, rng)
        said = [
            self.rows.answer_ids(self.rows.processor.normalize_text(fact.value), after_blank=True)
            for fact in facts[:SAID]
        ]
        values = torch.full((len(said), max(map(len, said))), IGNORED)
        for row, ids in enumerate(said):
            values[row, : len(ids)] = torch.tensor(ids)
        return MemoryBatch(
            features, factors, written, full, asked, pictures_alone, words, meanings, values, size
        )

    def _words(self, rng: np.random.Generator) -> tuple[tuple[Rows, Rows], Tensor]:
        """Pairs of wordings: of each kind of question that facts answer, of subjects, and of what they do not answer.

        "fact" may mean any of the kinds, and is left out. A question that no fact answers is a pair with itself: it is
        there to be different from the others.
        """
        facts = self._facts
        kinds = [kind for kind in MEMORY_KINDS if kind != "fact"]
        subjects = rng.choice(len(facts.subjects), SUBJECTS, replace=False)
        queries = [Query(-1, kind, "") for kind in kinds] * WORDINGS
        queries += [Query(-1, "text", facts.subjects[int(number)].text) for number in subjects]
        first, again = ([facts.ask(query, rng) for query in queries] for _ in range(2))
        seen = [facts.seen_question(kind, rng) for kind in SEEN_KINDS]
        meanings = [*range(len(kinds))] * WORDINGS
        meanings += range(len(kinds), len(kinds) + SUBJECTS + len(seen))
        first, again = [*first, *seen], [*again, *seen]
        without = [-1] * len(first)
        return (self._rows(first, without), self._rows(again, without)), torch.tensor(meanings)

    def _hide(self, rows: Rows, rng: np.random.Generator) -> None:
        """Mask some of the prefix embeddings of each picture's row."""
        windows, pieces = self.vision.num_tokens - 1, self.vision.name_pieces
        pictured = (rows.pictures >= 0).numpy()
        hidden = np.concatenate(
            [
                rng.random((len(pictured), 1)) < OTHERS_HIDDEN,
                rng.random((len(pictured), windows)) < WINDOWS_HIDDEN,
                np.repeat(rng.random((len(pictured), 1)) < OTHERS_HIDDEN, pieces, 1),
            ],
            1,
        )
        hidden[~pictured] = False
        rows.mask[:, : hidden.shape[1]][torch.from_numpy(hidden)] = 0

    def _hide_tokens(self, rows: Rows, rng: np.random.Generator) -> None:
        """Mask some of the tokens of each question, but for its last one, behind which an answer begins."""
        prefix = (rows.pictures >= 0).numpy() * self.prefix_tokens
        lengths = (rows.ids != self.rows.processor.pad_id).sum(1).numpy()
        place = np.arange(rows.ids.shape[1])
        can_be_hidden = (place >= prefix[:, None]) & (place < lengths[:, None] - 1)
        hidden = can_be_hidden & (rng.random(can_be_hidden.shape) < TOKENS_HIDDEN)
        rows.mask[torch.from_numpy(hidden)] = 0

    def _rows(
        self, questions: Sequence[str], pictures: Sequence[int], values: Sequence[str] | None = None
    ) -> Rows:
        processor = self.rows.processor
        tokens: list[list[int]] = []
        for number, (question, picture) in enumerate(zip(questions, pictures, strict=True)):
            row = list(processor.prompt_ids(processor.normalize_text(question), int(picture >= 0)))
            if values is not None:
                row += processor.text_ids(processor.normalize_text(values[number]))
            tokens.append(row)
        ids = torch.full((len(tokens), max(map(len, tokens), default=1)), processor.pad_id)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(tokens):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        return Rows(ids, mask, torch.tensor(list(pictures)))
