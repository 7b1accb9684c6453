"""What a teacher computes for rows of text, kept: a run that sees each text several times asks the teacher once.

Everything is computed before the first step, in batches of the texts' own order, so that a resumed run has the outputs
of an unbroken one. It is kept at the precision of training, in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from microvlm.training.batches.conversation_rows import Rows
from microvlm.training.batches.sample_texts import IGNORED
from microvlm.training.losses.distillation_loss import Heads

BATCH = 16
"""Rows that are computed at a time."""

Outputs = tuple[Tensor, Heads]
"""Hidden states at the labelled positions [n, H]; queries, keys and values [B, heads, S, D] of one layer."""


class _Kept(NamedTuple):
    """Of one row: hidden states [n, H], and Q, K and V [heads, S, D] of its tokens."""

    states: Tensor
    heads: tuple[Tensor, Tensor, Tensor]


def bytes_per_token(hidden: int, heads_width: int, precision: torch.dtype) -> int:
    """What is kept of a token: a hidden state, and `heads_width` numbers of Q, K and V together."""
    return (hidden + heads_width) * precision.itemsize


class TeacherOutputs:
    """Outputs by the tokens of a row."""

    def __init__(self, precision: torch.dtype):
        self.precision = precision
        self._rows: dict[bytes, _Kept] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(t.nbytes for kept in self._rows.values() for t in (kept.states, *kept.heads))

    def fill(
        self,
        texts: Sequence[str],
        build: Callable[[Sequence[str]], Rows],
        compute: Callable[[Rows], Outputs],
    ) -> None:
        """Compute the rows of all texts; a shorter and a longer one may share a batch."""
        for start in range(0, len(texts), BATCH):
            rows = build(texts[start : start + BATCH])
            states, heads = compute(rows)
            counts = (rows.labels != IGNORED).sum(1).tolist()
            by_row = states.to(self.precision).cpu().split(counts)
            lengths = rows.mask.sum(1).tolist()
            for number, (length, part) in enumerate(zip(lengths, by_row, strict=True)):
                query, key, value = (
                    head[number, :, :length].to(self.precision, copy=True).cpu() for head in heads
                )
                self._rows[_key(rows, number)] = _Kept(part.clone(), (query, key, value))

    def of(self, rows: Rows) -> Outputs | None:
        """The outputs of rows in float32 on their device; None where one is not kept."""
        found = [self._rows.get(_key(rows, number)) for number in range(len(rows.ids))]
        kept = [row for row in found if row is not None]
        if len(kept) < len(found):
            return None
        device, length = rows.ids.device, rows.ids.shape[1]
        states = torch.cat([row.states for row in kept]).to(device).float()
        query, key, value = (
            torch.stack([_padded(row.heads[part], length) for row in kept]).to(device).float()
            for part in range(3)
        )
        return states, (query, key, value)


def _key(rows: Rows, number: int) -> bytes:
    return rows.ids[number][rows.mask[number].bool()].cpu().numpy().tobytes()


def _padded(head: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(head, (0, 0, 0, length - head.shape[1]))
