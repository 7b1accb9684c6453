"""Facts to remember, as part of a `vlm` batch: written once, asked for with another view and other words.

Keys are taught to be one for all views and wordings of a fact's question and to differ from every other's (InfoNCE,
van den Oord et al. 2018, arXiv 1807.03748), and to spread over all slots (their frame potential, Benedetto & Fickus
2003: a read errs by the small singular values of the keys). Outside of the space of the keys, the code of a question
and that of its fact are taught alike in the same way, which is what the scope detector verifies a read by. Values, W_M
and the decoder learn from cross-entropy on the answer, read through memories of several sizes, and from a linear head
that names the answer in a read; the scope detector from what was and what was not written; the vision encoder, where it
learns, also from telling apart the drawings themselves, whatever is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.model.decoder import Cache
from microvlm.model.memory_algebra import MemoryState, batch_solution
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_ops import full_precision
from microvlm.training.batches.fact_batches import FactBatch
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.data.fact_texts import RELATIONS, UNKNOWN

KEY_WEIGHT, SPREAD_WEIGHT, MATCH_WEIGHT, NAME_WEIGHT, DRAWING_WEIGHT = 0.5, 3.0, 0.5, 0.5, 0.5
TEMPERATURE = 0.07
DRAWING_WIDTH = 128
VALUES = tuple(sorted({value for relation in RELATIONS for value in relation.values}))

CrossEntropy = Callable[[MicroVLM, Tensor, Tensor, Tensor, Cache, Tensor | None], Tensor]


class FactCodes(NamedTuple):
    """float32, a row a fact: codes [F, C] and keys [F, K]."""

    key: Tensor
    """Of the question that the fact was written under."""
    value: Tensor
    value_key: Tensor
    query: Tensor
    """The code of the question that asks for it."""
    asked: Tensor
    """That code's key."""


class Remembered(NamedTuple):
    """What the facts of a batch gave."""

    loss: Tensor
    scope: Tensor
    state: MemoryState
    """The memories, for other rows to be distracted by."""
    metrics: dict[str, Tensor]


class FactHeads(nn.Module):
    """What only training needs: the answer in a read code, before the readout and after it, and the place of a drawing
    among drawings."""

    def __init__(self, model: MicroVLM):
        super().__init__()
        width = model.config.memory.code_size
        self.gain = width**0.5
        self.answer = nn.Linear(width, len(VALUES))
        self.read_out = nn.Linear(width, len(VALUES))
        self.drawing = nn.Linear(2 * model.config.vision.hidden_size, DRAWING_WIDTH)
        self.index = {value: number for number, value in enumerate(VALUES)}

    def named(self, reading: Tensor, read_out: Tensor, values: list[str]) -> tuple[Tensor, Tensor]:
        """Read codes [n, C], what the readout makes of them and what they should say -> (both cross-entropies added,
        share that is right after the readout)."""
        wanted = torch.tensor([self.index[value] for value in values], device=reading.device)
        loss = F.cross_entropy(self.answer(self.gain * reading), wanted)
        logits = self.read_out(self.gain * read_out)
        return loss + F.cross_entropy(logits, wanted), (logits.argmax(1) == wanted).float().mean()

    def drawings(self, features: Tensor, leading: int, batch: FactBatch) -> Tensor:
        """InfoNCE of two views of each drawing, vision features [2 * shown, T, W] of `batch.views`."""
        pooled = torch.cat([features[:, 0], features[:, leading:].mean(1)], -1)
        written, asked = self.drawing(pooled).float().split(len(batch.shown))
        objects = np.array([fact.object for fact in batch.shown])
        return info_nce(asked, written, objects[:, None] == objects)


def remember(
    module: MicroVLM,
    heads: FactHeads,
    batch: FactBatch,
    prefixes: Tensor,
    rows: TextRows,
    cross_entropy: CrossEntropy,
    unknown_too: bool = True,
) -> Remembered:
    """prefixes [2 * len(shown), k, H] of `batch.views` -> the losses; `cross_entropy` is that of the answers.

    unknown_too : also teach to answer what was not written, where the slot is masked: only the decoder learns by it.
    """
    key, value, value_key, query, asked = encode_facts(module, batch, prefixes, rows)
    known = torch.from_numpy(batch.written).to(key.device)
    with full_precision(key.device.type):
        state = write_groups(module, key, value, batch)
        own = torch.from_numpy(batch.group).to(key.device)
        reading, scope, _, slot = module.memory_read(asked, query, *(part[own] for part in state))
        gate = _gate_loss(module, batch, state, query, asked, scope)
        same = _same_questions(batch)
        keyed = info_nce(asked, key, same)
        # What the detector compares: the codes without what lies in the space of the keys.
        sought, held = _beside(module, query, asked), _beside(module, value, value_key)
        matched = info_nce(sought, held, same)
        spread, scattered = frame_potential(key), frame_potential(held)
        said_values = [fact.value for fact in batch.facts]
        written = np.flatnonzero(batch.written)
        read_out = module.memory_projection.read_out(reading)
        named, found = heads.named(reading[known], read_out[known], [said_values[row] for row in written])
    asked_views = prefixes[len(batch.shown) :]
    said = _said(module, batch, asked_views, slot, rows, cross_entropy, unknown_too)
    nearest = (F.normalize(asked, dim=-1) @ F.normalize(key, dim=-1).T).argmax(1)
    metrics = {
        "facts": said,
        "keys": keyed,
        "matched": matched,
        "named_facts": named,
        "found": found,
        "gate": gate,
        "nearest": (nearest == torch.arange(len(nearest), device=nearest.device)).float().mean(),
        "spread": spread,
        "scattered": scattered,
        "opened": (scope[known] >= 0.5).float().mean(),
        "closed": (scope[~known] < 0.5).float().mean(),
    }
    loss = said + KEY_WEIGHT * keyed + MATCH_WEIGHT * matched + NAME_WEIGHT * named
    loss = loss + SPREAD_WEIGHT * (spread + scattered)
    return Remembered(loss, gate, state, metrics)


def encode_facts(module: MicroVLM, batch: FactBatch, prefixes: Tensor, rows: TextRows) -> FactCodes:
    """prefixes [2 * len(shown), k, H] of `batch.views` -> the codes of the facts."""
    written, asked = prefixes.split(len(batch.shown))
    parts = []
    for facts, views in ((batch.shown, torch.cat([written, written, asked])), (batch.told, None)):
        if facts:
            samples = [(fact.told, "") for fact in facts] + [(fact.told, fact.value) for fact in facts]
            samples += [(fact.asked, "") for fact in facts]
            codes, keys = encode(module, rows, samples, views)
            _, value, query = codes.split(len(facts))
            key, value_key, asked_key = keys.split(len(facts))
            parts.append((key, value, value_key, query, asked_key))
    return FactCodes(*map(torch.cat, zip(*parts, strict=True)))


def encode(
    module: MicroVLM, rows: TextRows, samples: list[tuple[str, str]], prefixes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Prompts, with answers or without -> (code [B, C], key [B, K]), float32."""
    embeds, mask, _ = rows.embedded(module, samples, prefixes)
    code, key = module.memory_encode(embeds, mask)
    return code.float(), key.float()


def _said(
    module: MicroVLM,
    batch: FactBatch,
    asked_views: Tensor,
    slot: Cache,
    rows: TextRows,
    cross_entropy: CrossEntropy,
    unknown_too: bool,
) -> Tensor:
    """Cross-entropy of the answers: the values that were written, "unknown" with the slot masked for the others."""
    said: Tensor = module.memory_prior.new_zeros(())
    answered = np.ones_like(batch.written) if unknown_too else batch.written
    begin = 0
    for facts, views in ((batch.shown, asked_views), (batch.told, None)):
        chosen = np.flatnonzero(answered[begin : begin + len(facts)])
        part = begin + chosen
        begin += len(facts)
        if not len(chosen):
            continue
        seen = batch.written[part]
        samples = [
            (facts[row].asked, facts[row].value if there else UNKNOWN)
            for row, there in zip(chosen, seen, strict=True)
        ]
        embeds, mask, labels = rows.embedded(
            module, samples, None if views is None else views[torch.from_numpy(chosen)]
        )
        places = torch.from_numpy(part)
        own_slot = [(k[places], v[places]) for k, v in slot]
        seen_by = torch.from_numpy(seen).to(said.device).long()
        loss = cross_entropy(module, embeds, mask, labels, own_slot, seen_by)
        said = said + loss * (len(chosen) / answered.sum())
    return said


def _gate_loss(
    module: MicroVLM, batch: FactBatch, state: MemoryState, query: Tensor, asked: Tensor, scope: Tensor
) -> Tensor:
    """Both sides weigh alike. What another memory holds is as little known to this one as what none does."""
    known = torch.from_numpy(batch.written).to(query.device)
    unknown = scope[~known]
    groups = len(state.mean)
    if groups > 1:
        other, strange = elsewhere(batch)
        rows, own = (torch.from_numpy(part).to(query.device) for part in (np.flatnonzero(strange), other))
        there = (part[own[rows]] for part in state)
        unknown = torch.cat([unknown, module.memory_read(asked[rows], query[rows], *there)[1]])
    return 0.5 * (binary_loss(scope[known], 1.0) + binary_loss(unknown, 0.0))


def elsewhere(batch: FactBatch) -> tuple[np.ndarray, np.ndarray]:
    """Another memory for each fact, int64 [F], and whether it knows nothing of the fact's question, bool [F].

    Two deals can have the same question; of one deal no memory has what another has.
    """
    other = (batch.group + 1) % (batch.group.max() + 1)
    there = (batch.group == other[:, None]) & batch.written
    return other, ~(_same_questions(batch) & there).any(1)


def _beside(module: MicroVLM, code: Tensor, key: Tensor) -> Tensor:
    """Codes [F, C] and their keys [F, K] -> what of the codes lies outside of the space of keys, [F, C]."""
    return code - key @ module.memory_encoder.pseudo_inverse.T


def write_groups(module: MicroVLM, key: Tensor, value: Tensor, batch: FactBatch) -> MemoryState:
    """One memory a group, by the batch solution, which sequential writing equals."""
    written = np.flatnonzero(batch.written)
    group = batch.group[written]
    counts = np.bincount(group, minlength=batch.group.max() + 1)
    # The place of each fact among those of its memory.
    order = np.argsort(group, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows, group, place = (torch.from_numpy(part).to(key.device) for part in (written, group, place))
    keys, values = (
        part.new_zeros(len(counts), int(counts.max()), part.shape[1]).index_put((group, place), part[rows])
        for part in (key, value)
    )
    prior = module.memory_prior_state().mean[0].float()
    return batch_solution(prior, keys, values, module.config.memory.observation_variance)


def _same_questions(batch: FactBatch) -> np.ndarray:
    """bool [F, F]: the very same question in words alone, or about one drawing."""
    names = [
        (fact.object, fact.relation, number < len(batch.shown)) for number, fact in enumerate(batch.facts)
    ]
    number = np.unique(names, axis=0, return_inverse=True)[1].ravel()
    return number[:, None] == number


def info_nce(queries: Tensor, keys: Tensor, same: np.ndarray) -> Tensor:
    """InfoNCE both ways of rows that belong together, [F, W] each; bool `same` [F, F] are no negatives."""
    scores = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T / TEMPERATURE
    others = torch.from_numpy(same & ~np.eye(len(same), dtype=bool)).to(scores.device)
    scores = scores.masked_fill(others, float("-inf"))
    wanted = torch.arange(len(same), device=scores.device)
    return 0.5 * (F.cross_entropy(scores, wanted) + F.cross_entropy(scores.T, wanted))


def frame_potential(rows: Tensor) -> Tensor:
    """Mean squared cosine of two different rows of [F, W]: 1 / W where they are spread evenly."""
    cosines = F.normalize(rows, dim=-1) @ F.normalize(rows, dim=-1).T
    count = len(rows)
    return (cosines.square().sum() - count) / (count * (count - 1))


def binary_loss(probability: Tensor, target: float) -> Tensor:
    """Mean cross-entropy of probabilities [n] from one target, 0 or 1; 0 for none."""
    if not len(probability):
        return probability.new_zeros(())
    probability = probability.float().clamp(1e-6, 1 - 1e-6)
    return -(probability.log() if target else (1 - probability).log()).mean()
