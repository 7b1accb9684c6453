"""Losses on facts: each fact is written into a memory once and read with another view and other words.

- Keys: InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) makes the keys of all views and wordings of one question
  equal and those of different questions different. The frame potential (Benedetto & Fickus 2003) spreads keys over all
  slots, because the error of a read grows with the small singular values of the keys.
- Latents outside the space of keys: the same two losses on a question and its fact. The scope detector verifies a read
  by this part.
- Values, W_M and the decoder: cross-entropy of the answer, read through memories of several sizes, and of a linear head
  that names the answer in a read latent.
- Scope detector: binary cross-entropy on written against unwritten facts.
- Vision encoder, where it learns: InfoNCE of two views of one drawing, whatever the question (`FactHeads.drawings`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.model.decoder import Cache
from microvlm.model.memory_algebra import MemoryState
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_ops import full_precision
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.emoji.batches.fact_batches import FactBatch
from microvlm.training.emoji.data.fact_texts import RELATIONS, UNKNOWN
from microvlm.training.emoji.losses.fact_latents import encode_facts, outside_key_space, write_memories
from microvlm.training.losses.loss_terms import AnswerLoss, binary_loss, frame_potential, info_nce

KEY_WEIGHT, SPREAD_WEIGHT, MATCH_WEIGHT, NAME_WEIGHT, DRAWING_WEIGHT = 0.5, 3.0, 0.5, 0.5, 0.5
DRAWING_WIDTH = 128
VALUES = tuple(sorted({value for relation in RELATIONS for value in relation.values}))


class FactLosses(NamedTuple):
    """Losses of one batch of facts."""

    loss: Tensor
    """Weighted sum of all but the scope detector's."""
    scope: Tensor
    """The scope detector's."""
    state: MemoryState
    """The written memories, which other rows of the batch see as distractors."""
    metrics: dict[str, Tensor]


class FactHeads(nn.Module):
    """Heads that exist in training only: two that name the answer in a read latent, one that embeds drawings."""

    def __init__(self, model: MicroVLM):
        super().__init__()
        width = model.config.memory.code_size
        self.gain = width**0.5
        self.answer = nn.Linear(width, len(VALUES))
        self.read_out = nn.Linear(width, len(VALUES))
        self.drawing = nn.Linear(2 * model.config.vision.hidden_size, DRAWING_WIDTH)
        self.index = {value: number for number, value in enumerate(VALUES)}

    def naming_loss(self, reading: Tensor, read_out: Tensor, values: list[str]) -> tuple[Tensor, Tensor]:
        """Name the answer in read latents [n, C], before the readout (`reading`) and after it (`read_out`).

        Returns the sum of both cross-entropies and the share of right names after the readout.
        """
        target = torch.tensor([self.index[value] for value in values], device=reading.device)
        loss = F.cross_entropy(self.answer(self.gain * reading), target)
        logits = self.read_out(self.gain * read_out)
        return loss + F.cross_entropy(logits, target), (logits.argmax(1) == target).float().mean()

    def drawings(self, features: Tensor, leading: int, batch: FactBatch) -> Tensor:
        """InfoNCE between two views of each drawing.

        features : vision features [2 * len(pictured), T, W] of `batch.views`. leading : tokens before the patches.
        """
        pooled = torch.cat([features[:, 0], features[:, leading:].mean(1)], -1)
        write_views, read_views = self.drawing(pooled).float().split(len(batch.pictured))
        objects = np.array([fact.object for fact in batch.pictured])
        return info_nce(read_views, write_views, objects[:, None] == objects)


def fact_losses(
    module: MicroVLM,
    heads: FactHeads,
    batch: FactBatch,
    prefixes: Tensor,
    rows: TextRows,
    cross_entropy: AnswerLoss,
    teach_unknown: bool = True,
) -> FactLosses:
    """Write the batch's facts into memories, read them, and compute all losses on them.

    prefixes : [2 * len(pictured), k, H] of `batch.views`. cross_entropy : the loss of the answers. teach_unknown : also
    teach the answer "unknown" to questions about unwritten facts, with the memory slot masked; only the decoder learns
    from it.
    """
    write_key, value, value_key, query, query_key = encode_facts(module, batch, prefixes, rows)
    is_known = torch.from_numpy(batch.is_written).to(write_key.device)
    with full_precision(write_key.device.type):
        state = write_memories(module, write_key, value, batch)
        own = torch.from_numpy(batch.group).to(write_key.device)
        reading, scope, _, slot = module.memory_read(query_key, query, *(part[own] for part in state))
        gate = _scope_loss(module, batch, state, query, query_key, scope)
        same = _same_questions(batch)
        keyed = info_nce(query_key, write_key, same)
        query_rest = outside_key_space(module, query, query_key)
        value_rest = outside_key_space(module, value, value_key)
        matched = info_nce(query_rest, value_rest, same)
        spread, scattered = frame_potential(write_key), frame_potential(value_rest)
        written_values = [batch.facts[row].value for row in np.flatnonzero(batch.is_written)]
        read_out = module.memory_projection.read_out(reading)
        naming_loss, naming_accuracy = heads.naming_loss(
            reading[is_known], read_out[is_known], written_values
        )
    read_views = prefixes[len(batch.pictured) :]
    answers = _answer_losses(module, batch, read_views, slot, rows, cross_entropy, teach_unknown)
    nearest = (F.normalize(query_key, dim=-1) @ F.normalize(write_key, dim=-1).T).argmax(1)
    metrics = {
        "facts": answers,
        "keys": keyed,
        "matched": matched,
        "named_facts": naming_loss,
        "found": naming_accuracy,
        "gate": gate,
        "nearest": (nearest == torch.arange(len(nearest), device=nearest.device)).float().mean(),
        "spread": spread,
        "scattered": scattered,
        "opened": (scope[is_known] >= 0.5).float().mean(),
        "closed": (scope[~is_known] < 0.5).float().mean(),
    }
    loss = answers + KEY_WEIGHT * keyed + MATCH_WEIGHT * matched + NAME_WEIGHT * naming_loss
    loss = loss + SPREAD_WEIGHT * (spread + scattered)
    return FactLosses(loss, gate, state, metrics)


def _answer_losses(
    module: MicroVLM,
    batch: FactBatch,
    read_views: Tensor,
    slot: Cache,
    rows: TextRows,
    cross_entropy: AnswerLoss,
    teach_unknown: bool,
) -> Tensor:
    """Cross-entropy of the answers: written values, and "unknown" with the slot masked for the other questions."""
    total: Tensor = module.memory_prior.new_zeros(())
    answered = np.ones_like(batch.is_written) if teach_unknown else batch.is_written
    start = 0
    for facts, views in ((batch.pictured, read_views), (batch.text_only, None)):
        chosen = np.flatnonzero(answered[start : start + len(facts)])
        part = start + chosen
        start += len(facts)
        if not len(chosen):
            continue
        has_answer_rows = batch.is_written[part]
        samples = [
            (facts[row].read_question, facts[row].value if has_answer else UNKNOWN)
            for row, has_answer in zip(chosen, has_answer_rows, strict=True)
        ]
        embeds, mask, labels = rows.embedded(
            module, samples, None if views is None else views[torch.from_numpy(chosen)]
        )
        places = torch.from_numpy(part)
        own_slot = [(k[places], v[places]) for k, v in slot]
        slot_visible = torch.from_numpy(has_answer_rows).to(total.device).long()
        loss = cross_entropy(module, embeds, mask, labels, own_slot, slot_visible)
        total = total + loss * (len(chosen) / answered.sum())
    return total


def _scope_loss(
    module: MicroVLM, batch: FactBatch, state: MemoryState, query: Tensor, query_key: Tensor, scope: Tensor
) -> Tensor:
    """Binary cross-entropy of the scope detector, known and unknown questions weighted alike.

    A question is unknown to its own memory if its fact was not written, and to another memory that lacks it.
    """
    is_known = torch.from_numpy(batch.is_written).to(query.device)
    unknown = scope[~is_known]
    groups = len(state.mean)
    if groups > 1:
        other, absent = other_memory(batch)
        rows, own = (torch.from_numpy(part).to(query.device) for part in (np.flatnonzero(absent), other))
        others = (part[own[rows]] for part in state)
        unknown = torch.cat([unknown, module.memory_read(query_key[rows], query[rows], *others)[1]])
    return 0.5 * (binary_loss(scope[is_known], 1.0) + binary_loss(unknown, 0.0))


def other_memory(batch: FactBatch) -> tuple[np.ndarray, np.ndarray]:
    """Another memory for each fact, int64 [F], and whether that memory lacks the fact's question, bool [F].

    Two sets of facts can contain the same question; within one set no two memories do.
    """
    other = (batch.group + 1) % (batch.group.max() + 1)
    in_other = (batch.group == other[:, None]) & batch.is_written
    return other, ~(_same_questions(batch) & in_other).any(1)


def _same_questions(batch: FactBatch) -> np.ndarray:
    """bool [F, F]: two facts have the same relation, object and form (both with a picture or both without)."""
    names = [
        (fact.object, fact.relation, number < len(batch.pictured)) for number, fact in enumerate(batch.facts)
    ]
    number = np.unique(names, axis=0, return_inverse=True)[1].ravel()
    return number[:, None] == number
