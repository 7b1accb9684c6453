"""Token rows of plain texts, without a template: what a decoder predicts when it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from microvlm.inputs.processor import Processor
from microvlm.training.batches.conversation_rows import ConversationRows, Rows
from microvlm.training.batches.sample_texts import IGNORED

MOST_TOKENS = 256
"""Longer texts are cut."""
ROW_MULTIPLE = 8
"""Rows are padded to a multiple of it: tensors of few sizes reuse each other's memory, those of many do not."""


_PROBE = "a photo of two dogs, 1.58 bits and a cup of coffee"


def cut_alike(first: Any, second: Any) -> bool:
    """Whether two tokenizers cut a text into the same tokens."""
    same: bool = first.encode(_PROBE) == second.encode(_PROBE)
    return same


class TokenRows:
    """Makes rows of a tokenizer."""

    def __init__(self, processor: Processor):
        self.processor = processor
        self._cleaner = ConversationRows(processor)

    def tokens(self, text: str) -> list[int]:
        """At most MOST_TOKENS tokens; special tokens in the text are left out."""
        return self.processor.tokenizer.encode(self._cleaner.clean(text))[:MOST_TOKENS]

    def build(self, texts: Sequence[str]) -> Rows:
        """Rows [B, S] of texts; each token but a row's first is the label of the position before it."""
        parts = [self.tokens(text) for text in texts]
        length = -(-max(1, *map(len, parts)) // ROW_MULTIPLE) * ROW_MULTIPLE
        ids = torch.full((len(parts), length), self.processor.pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, tokens in enumerate(parts):
            count = len(tokens)
            ids[row, :count] = torch.tensor(tokens)
            mask[row, :count] = 1
            if count > 1:
                labels[row, : count - 1] = torch.tensor(tokens[1:])
        return Rows(ids, mask, labels)


def row_states(model: torch.nn.Module, rows: Rows) -> Tensor:
    """Hidden states [n, H] at the labelled positions of rows, without a picture or a memory."""
    states: Tensor = model.hidden_states(model.embed(rows.ids), rows.mask)  # type: ignore[operator]
    return states[rows.labels != IGNORED]


def row_logits(model: torch.nn.Module, rows: Rows) -> Tensor:
    """Logits [n, V] at the labelled positions of rows, without a picture or a memory."""
    logits: Tensor = model(model.embed(rows.ids), rows.mask, None, None, rows.labels != IGNORED)  # type: ignore[operator]
    return logits
