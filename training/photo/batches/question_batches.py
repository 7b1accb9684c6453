"""Batches of encoded pictures, each with several questions that share its prefix embeddings."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from microvlm.training.batches.sample_texts import TextRows, labelled_rows
from microvlm.training.photo.batches.picture_questions import Asked, Questioner
from microvlm.training.photo.batches.virtual_pictures import VirtualPictures
from microvlm.training.photo.data.builder import PLAIN
from microvlm.training.photo.data.class_names import class_names
from microvlm.training.photo.data.composer import WHOLE, Description, Thing
from microvlm.training.photo.data.photo_data import PhotoData

VIRTUAL_SHARE = 0.25
"""Share of a batch's pictures that are made maps of the encoder's classes (`virtual_pictures`)."""


TOLD_SHARE = 0.5
"""Share of the pictures whose first token has class probabilities alone, as in the stage before."""
UNNAMED_CHANCE = 0.3
"""How often a drawing of an unnamed thing is drawn, next to another picture: people show few of them."""


class QuestionRows(NamedTuple):
    """Questions and answers behind the prefix embeddings of their pictures, padded on the right."""

    ids: Tensor
    """int64 [R, S]."""
    mask: Tensor
    labels: Tensor
    """The token that each position must predict, IGNORED on questions and padding."""
    pictures: Tensor
    """int64 [R], the picture of each row."""


class QuestionBatch(NamedTuple):
    """One batch."""

    features: Tensor
    """uint8 [B, F, S, S]."""
    rows: QuestionRows
    asked: list[Asked]
    descriptions: list[Description]
    is_told: Tensor
    """bool [B], pictures of which the first token has class probabilities alone."""


def question_rows(rows: TextRows, asked: list[tuple[int, str, str]], prefix_tokens: int) -> QuestionRows:
    """(picture, question, answer) of every row -> token rows without the image tokens, which come first.

    An answer begins with a blank: a name then has the same tokens everywhere.
    """
    parts = []
    for _, question, answer in asked:
        prompt = rows.processor.prompt_ids(question, 1)
        if prompt[:prefix_tokens] != [rows.processor.image_id] * prefix_tokens:
            raise ValueError("the template must begin with the image")
        parts.append((prompt[prefix_tokens:], rows.answer_ids(answer, after_blank=True)))
    pictures = torch.tensor([picture for picture, _, _ in asked])
    return QuestionRows(*labelled_rows(parts, rows.processor.pad_id), pictures)


class QuestionSampler:
    """Draws batches of one split."""

    def __init__(
        self,
        data: PhotoData,
        rows: TextRows,
        virtual: VirtualPictures | None,
        prefix_tokens: int,
        virtual_share: float,
    ):
        self.data, self.rows, self.virtual, self.prefix_tokens = data, rows, virtual, prefix_tokens
        self.virtual_share = virtual_share
        parts = [part for part in ("train", PLAIN) if data.index.chunks.get(part, 0)]
        self.pictures = [(part, row) for part in parts for row in range(len(data.descriptions(part)))]
        self._chances = np.array(
            [
                UNNAMED_CHANCE if data.descriptions(part)[row].kind == "unnamed" else 1.0
                for part, row in self.pictures
            ]
        )
        self._chances /= self._chances.sum()
        self.questioner = Questioner(data.names)
        self.photos = data.photographs("train")
        self.classes = class_names()

    def draw(self, rng: np.random.Generator, pictures: int, questions: int) -> QuestionBatch:
        """`pictures` pictures with `questions` questions each."""
        virtual = round(pictures * self.virtual_share) if self.virtual is not None and len(self.photos) else 0
        places = rng.choice(len(self.pictures), pictures - virtual, p=self._chances)
        chosen = [self.pictures[i] for i in places]
        descriptions = [self.data.descriptions(part)[row] for part, row in chosen]
        features = [self.data.features(part, np.array([row])) for part, row in chosen]
        if virtual:
            assert self.virtual is not None
            maps = self.data.features("train", rng.choice(self.photos, virtual))
            made, classes = self.virtual.make(maps, rng)
            keep = classes >= 0
            features.append(made[keep])
            descriptions += [
                Description("virtual", (Thing(self.classes[number], WHOLE),)) for number in classes[keep]
            ]
        asked = [self.questioner.ask(d, rng) for d in descriptions for _ in range(questions)]
        numbered = [(i // questions, a.question, a.answer) for i, a in enumerate(asked)]
        rows = question_rows(self.rows, numbered, self.prefix_tokens)
        is_told = torch.from_numpy(rng.random(len(descriptions)) < TOLD_SHARE)
        return QuestionBatch(torch.from_numpy(np.concatenate(features)), rows, asked, descriptions, is_told)
