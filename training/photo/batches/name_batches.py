"""Batches of pictures and their names, as short rows: half of the pictures are made (`virtual_pictures`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.photo.batches.class_targets import ALONE, NAMELESS
from microvlm.training.photo.batches.question_batches import QuestionRows, question_rows
from microvlm.training.photo.batches.virtual_pictures import VirtualPictures
from microvlm.training.photo.data.class_names import class_names
from microvlm.training.photo.data.photo_data import PhotoData
from microvlm.training.photo.language import answers
from microvlm.training.photo.language.question_forms import question

VIRTUAL_SHARE, NAMELESS_SHARE = 0.5, 0.08
TOLD_SHARE = 0.5
"""Share of the rows that see class probabilities alone: with features always in view the decoder told made ones from
real ones, and said that it did not know photographs of what has none here."""
PLAIN_QUESTIONS = ("what is this?", "what do you see?", "describe the image")
"""Most rows ask one of these; the others ask in any wording of `what`."""
PLAIN_SHARE = 0.7
MIXED_SHARE, MOST_MIXED = 0.3, 0.5
"""Share of the rows whose features are mixed with another picture's, and the most of it. The classifier is sure of the
pictures that it was trained on, and not of others: the decoder must meet that too, or it is as sure of every name."""
BORROWED_SHARE, FAINT = 0.2, 0.3
"""Share of the rows whose prefix spells another name than the picture's, which is then the answer: what is said must be
read from there, and not from what the decoder remembers of a class. And the most of a second name that is mixed in."""


class NameBatch(NamedTuple):
    """Pictures and their names."""

    quarters: Tensor
    """float32 [B, 4, F], mean bytes of the quarters of each picture's map."""
    rows: QuestionRows
    is_told: Tensor
    """bool [B], whether only class probabilities are seen and the features are hidden."""
    borrowed: Tensor
    """int64 [B, 2], classes whose names are spelled in place of the picture's, the second one faintly; -1 in most."""
    faint: Tensor
    """float32 [B], how much of the second name is mixed in."""


class NameSampler:
    """Draws batches of names: of pictures of one thing, of pictures of nothing with a name, and of made ones."""

    def __init__(
        self,
        data: PhotoData,
        rows: TextRows,
        virtual: VirtualPictures | None,
        prefix_tokens: int,
        borrows: bool,
    ):
        """`borrows` says whether the prefix of the model spells a name."""
        self.data, self.rows, self.virtual, self.prefix_tokens = data, rows, virtual, prefix_tokens
        self.borrowed_share = BORROWED_SHARE if borrows else 0.0
        self.parts = data.named_parts
        places = [
            (part, row, d.kind if d.kind not in ALONE or d.things[0].name else "unnamed")
            for part, name in enumerate(self.parts)
            for row, d in enumerate(data.descriptions(name))
        ]
        self._named, self._nameless = (
            np.array([(part, row) for part, row, kind in places if kind in kinds], np.int64).reshape(-1, 2)
            for kinds in (ALONE, NAMELESS)
        )
        self._photos = data.photographs("train")
        self._classes = class_names()

    def draw(self, rng: np.random.Generator, size: int) -> NameBatch:
        """`size` rows."""
        virtual = round(size * VIRTUAL_SHARE) if self.virtual is not None else 0
        nameless = round(size * NAMELESS_SHARE) if len(self._nameless) else 0
        chosen = np.concatenate(
            [
                self._named[rng.integers(len(self._named), size=size - virtual - nameless)],
                self._nameless[rng.integers(len(self._nameless), size=nameless)]
                if nameless
                else self._nameless[:0],
            ]
        )
        shown = [self.data.descriptions(self.parts[part])[row] for part, row in chosen]
        names = [d.things[0].name if d.kind in ALONE else None for d in shown]
        found = [
            self._mixed(
                torch.cat([quarters(self.data, self.parts[p], np.array([r])) for p, r in chosen]), rng
            )
        ]
        if self.virtual is not None and virtual:
            scale, width = self.virtual.scale, self.virtual.width
            real = torch.cat(
                [quarters(self.data, "train", rng.choice(self._photos, 1)) for _ in range(virtual)]
            )
            seen, colours = real[..., :width], real[..., width:]
            made, told = self.virtual.means(seen.mean(1) * scale, rng)
            # The quarters differ as those of a photograph do, and have its colours.
            moved = (seen + (made / scale - seen.mean(1))[:, None]).clamp(0, 255)
            found.append(torch.cat([moved, colours], -1))
            names += [self._classes[number] for number in told.argmax(1).tolist()]
        borrowed = torch.full((len(names), 2), -1)
        for number in np.flatnonzero(rng.random(len(names)) < self.borrowed_share):
            borrowed[number] = torch.from_numpy(rng.integers(len(self.data.names), size=2))
            names[number] = self.data.names[int(borrowed[number, 0])]
        asked = [
            (number, self._question(rng), answers.UNKNOWN_THING if name is None else name)
            for number, name in enumerate(names)
        ]
        rows = question_rows(self.rows, asked, self.prefix_tokens)
        is_told = torch.from_numpy(rng.random(len(names)) < TOLD_SHARE)
        faint = torch.from_numpy(rng.uniform(0, FAINT, len(names))).float()
        return NameBatch(torch.cat(found), rows, is_told, borrowed, faint)

    def _mixed(self, features: Tensor, rng: np.random.Generator) -> Tensor:
        """Features [n, 4, F] of which some are mixed with another row's."""
        share = rng.uniform(0, MOST_MIXED, len(features)) * (rng.random(len(features)) < MIXED_SHARE)
        mixed = torch.from_numpy(share).float()[:, None, None]
        return (1 - mixed) * features + mixed * features[torch.from_numpy(rng.permutation(len(features)))]

    def _question(self, rng: np.random.Generator) -> str:
        if rng.random() < PLAIN_SHARE:
            return PLAIN_QUESTIONS[int(rng.integers(len(PLAIN_QUESTIONS)))]
        return question("what", rng)


def quarters(data: PhotoData, part: str, rows: np.ndarray) -> Tensor:
    """Mean bytes float32 [n, 4, F] of the quarters of pictures' maps."""
    maps = torch.from_numpy(data.features(part, rows)).float()
    half = maps.shape[-1] // 2
    return F.avg_pool2d(maps, half).flatten(2).mT


def plain_batch(quarters: Tensor, rows: QuestionRows) -> NameBatch:
    """Rows that see all of their pictures and nothing else."""
    count = len(quarters)
    hidden, borrowed = torch.zeros(count, dtype=torch.bool), torch.full((count, 2), -1)
    return NameBatch(quarters, rows, hidden, borrowed, torch.zeros(count))
