"""Token rows of questions about any number of images, with labels on the answers. Caches nothing of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from microvlm.errors import UserError
from microvlm.inputs.processor import Processor
from microvlm.training.batches.sample_texts import IGNORED, labelled_rows

MAX_ANSWER_TOKENS = 128
"""Longer answers are cut, without an end token."""


class Exchange(NamedTuple):
    """One question and its answer, about `images` pictures that are shown with it."""

    question: str
    answer: str
    images: int


class Rows(NamedTuple):
    """Padded token rows, int64 [B, S] each; padded on the right."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    """The token that each position must predict; IGNORED on prompts, prefixes and padding."""

    def to(self, device: torch.device) -> Rows:
        return Rows(*(part.to(device, non_blocking=True) for part in self))


def prompt_mask(mask: Tensor, labels: Tensor) -> Tensor:
    """The mask [B, S] of rows without their answers: a memory's query is the whole prompt, as at inference."""
    # The last token of a prompt has the answer's first one as its label.
    return mask * (labels != IGNORED).cumsum(1).le(1)


class ConversationRows:
    """Makes rows of a processor's template: images, question, answer, end token."""

    def __init__(self, processor: Processor):
        self.processor = processor
        self._special = sorted(processor.tokenizer.added_tokens, key=len, reverse=True)

    def clean(self, text: str) -> str:
        """The text without special tokens, which would end an answer or stand for a picture."""
        for token in self._special:
            for spelling in (token, token.upper(), token.title()):
                text = text.replace(spelling, " ")
        return text.strip() or "-"

    def build(self, exchanges: Sequence[Exchange]) -> Rows:
        """Rows of one exchange each. Raises UserError for a question with more images than the model has positions."""
        return Rows(*labelled_rows([self._ids(exchange) for exchange in exchanges], self.processor.pad_id))

    def prompts(self, questions: Sequence[str], images: int = 0) -> Rows:
        """Rows of questions without answers, with `images` pictures each."""
        parts = [self._prompt(question, images) for question in questions]
        shape = len(parts), max(map(len, parts))
        ids, mask, labels = (np.full(shape, fill) for fill in (self.processor.pad_id, 0, IGNORED))
        for row, head in enumerate(parts):
            ids[row, : len(head)] = head
            mask[row, : len(head)] = 1
        return Rows(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels))

    def _prompt(self, question: str, images: int) -> list[int]:
        return self.processor.prompt_ids(self.clean(question), images)

    def _ids(self, exchange: Exchange) -> tuple[list[int], list[int]]:
        head = self._prompt(exchange.question, exchange.images)
        tail = self.processor.text_ids(self.clean(exchange.answer))
        room = self.processor.config.text.max_position_embeddings - len(head) - 1
        if room < 1:
            raise UserError(
                f"a question with {exchange.images} images takes {len(head)} of the model's "
                f"{self.processor.config.text.max_position_embeddings} positions: split it in the data set."
            )
        limit = min(MAX_ANSWER_TOKENS, room)
        tail = tail[:limit] if len(tail) >= limit else [*tail, self.processor.eos_id]
        return head, tail
