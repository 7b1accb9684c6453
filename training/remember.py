"""Facts to remember, as part of a `vlm` batch: written once, asked for with another view and other words.

Keys are taught to be one for all views and wordings of a fact's question and to differ from every other's (InfoNCE,
van den Oord et al. 2018, arXiv 1807.03748), and to spread over all slots (their frame potential, Benedetto & Fickus
2003: a read errs by the small singular values of the keys); values, W_M and the decoder by cross-entropy on the
answer, read through memories of several sizes; the scope detector on what was and what was not written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from microvlm.decoder import Cache
from microvlm.memory import MemoryState, batch_solution
from microvlm.model import MicroVLM
from microvlm.training.data.emoji import EmojiData
from microvlm.training.data.facts import UNKNOWN, Fact, deal_facts
from microvlm.training.data.views import augment_emoji, corner_neighbour
from microvlm.training.distill import DrawingSampler

GROUP_COUNTS = (1, 1, 2, 4, 8)
"""Into how many memories a batch of facts is dealt: few are full, many hold little."""
UNWRITTEN_SHARE = 0.2
TEXT_SHARE = 0.15
"""Share of the facts that have no picture."""
KEY_WEIGHT, SPREAD_WEIGHT, READING_WEIGHT = 0.5, 3.0, 0.3
KEY_TEMPERATURE, READING_TEMPERATURE = 0.07, 0.1

Embed = Callable[[MicroVLM, list[tuple[str, str]], Tensor | None], tuple[Tensor, Tensor, Tensor]]
CrossEntropy = Callable[[MicroVLM, Tensor, Tensor, Tensor, Cache, Tensor | None], Tensor]


class FactBatch(NamedTuple):
    """Facts with a picture, then facts of words alone."""

    shown: list[Fact]
    told: list[Fact]
    views: Tensor
    """float32 [2 * len(shown), 3, S, S]: as written, then as asked for."""
    group: np.ndarray
    """int64 [F], which memory each fact belongs to."""
    written: np.ndarray
    """bool [F]; the others are asked for all the same."""

    @property
    def facts(self) -> list[Fact]:
        return [*self.shown, *self.told]


class Remembered(NamedTuple):
    """What the facts of a batch gave."""

    loss: Tensor
    scope: Tensor
    state: MemoryState
    """The memories, for other rows to be distracted by."""
    metrics: dict[str, float]


class FactDealer:
    """Draws facts about emoji that the training vendors drew and that are not held out."""

    def __init__(self, emoji: EmojiData, sampler: DrawingSampler, count: int, strength: float):
        self.emoji, self.sampler, self.strength = emoji, sampler, strength
        self.rows = np.flatnonzero(sampler.drawn & ~emoji.held_out)
        self.shown = count - round(count * TEXT_SHARE)
        self.told = count - self.shown

    def deal(self, rng: np.random.Generator, generator: torch.Generator) -> FactBatch:
        count = self.shown + self.told
        objects = rng.choice(self.rows, count, replace=count > len(self.rows))
        shown = deal_facts(rng, objects[: self.shown], self.emoji.captions, True)
        told = deal_facts(rng, objects[self.shown :], self.emoji.captions, False)
        rows = np.array([fact.object for fact in shown], np.int64)
        # An object is one drawing: both views of a fact, and of two facts about it, are of one vendor.
        vendor_of = dict(zip(rows.tolist(), self.sampler.vendors_of(rows, generator), strict=True))
        drawings = self.sampler.pixels(rows, np.array([vendor_of[row] for row in rows.tolist()], np.int64))
        views = augment_emoji(torch.cat([drawings, drawings]), generator, self.strength)
        groups = int(rng.choice(GROUP_COUNTS))
        group = rng.permutation(np.arange(count) % groups)
        written = rng.random(count) >= UNWRITTEN_SHARE
        # No memory is empty.
        written[[np.flatnonzero(group == number)[0] for number in range(groups)]] = True
        return FactBatch(shown, told, corner_neighbour(views, generator), group, written)


def remember(
    module: MicroVLM, batch: FactBatch, prefixes: Tensor, embed: Embed, cross_entropy: CrossEntropy
) -> Remembered:
    """prefixes [2 * len(shown), k, H] of `batch.views` -> the losses.

    `embed` makes rows of (prompt, answer) pairs with or without a picture each, `cross_entropy` is that of the answers.
    """
    written_views, asked_views = prefixes.split(len(batch.shown))
    parts = ((batch.shown, written_views, asked_views), (batch.told, None, None))
    keys, values, queries, asked_keys, rows = [], [], [], [], []
    for facts, written_view, asked_view in parts:
        if not facts:
            continue
        keys.append(_encode(module, embed(module, [(f.told, "") for f in facts], written_view))[1])
        values.append(_encode(module, embed(module, [(f.told, f.value) for f in facts], written_view))[0])
        code, key = _encode(module, embed(module, [(f.asked, "") for f in facts], asked_view))
        queries.append(code)
        asked_keys.append(key)
        rows.append((facts, asked_view))
    key, value, query, asked = (torch.cat(part) for part in (keys, values, queries, asked_keys))
    with torch.autocast("cpu", enabled=False):
        state = _write(module, key, value, batch)
        own = torch.from_numpy(batch.group).to(key.device)
        reading, scope, _, slot = module.memory_read(asked, query, *(part[own] for part in state))
        known = torch.from_numpy(batch.written).to(key.device)
        keyed = _same_key_loss(asked, key, batch)
        spread = _frame_potential(key)
        separated = _reading_loss(reading[known], value, batch)
    said: Tensor = key.new_zeros(())
    begin = 0
    for facts, view in rows:
        part = slice(begin, begin + len(facts))
        begin += len(facts)
        seen = batch.written[part]
        samples = [(f.asked, f.value if there else UNKNOWN) for f, there in zip(facts, seen, strict=True)]
        embeds, mask, labels = embed(module, samples, view)
        own_slot = [(k[part], v[part]) for k, v in slot]
        answered = cross_entropy(module, embeds, mask, labels, own_slot, known[part].long())
        said = said + answered * (len(facts) / len(batch.facts))
    gate = 0.5 * (binary_loss(scope[known], 1.0) + binary_loss(scope[~known], 0.0))
    nearest = (F.normalize(asked, dim=-1) @ F.normalize(key, dim=-1).T).argmax(1).cpu().numpy()
    metrics = {
        "facts": said.item(),
        "keys": keyed.item(),
        "reading": separated.item(),
        "gate": gate.item(),
        "nearest": float(np.mean(nearest == np.arange(len(nearest)))),
        "spread": spread.item(),
        "opened": (scope[known] >= 0.5).float().mean().item(),
        "closed": (scope[~known] < 0.5).float().mean().item(),
    }
    loss = said + KEY_WEIGHT * keyed + SPREAD_WEIGHT * spread + READING_WEIGHT * separated
    return Remembered(loss, gate, state, metrics)


def _encode(module: MicroVLM, row: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(code [B, C], key [B, K]), float32."""
    code, key = module.memory_encode(row[0], row[1])
    return code.float(), key.float()


def _write(module: MicroVLM, key: Tensor, value: Tensor, batch: FactBatch) -> MemoryState:
    """One memory a group, by the batch solution, which sequential writing equals."""
    variance = module.config.memory.observation_variance
    prior = module.memory_prior_state().mean[0].float()
    states = []
    for number in range(batch.group.max() + 1):
        rows = torch.from_numpy(np.flatnonzero((batch.group == number) & batch.written)).to(key.device)
        states.append(batch_solution(prior, key[rows], value[rows], variance))
    return MemoryState(*(torch.cat(part) for part in zip(*states, strict=True)))


def _same_key_loss(asked: Tensor, told: Tensor, batch: FactBatch) -> Tensor:
    """InfoNCE over all facts of the batch, both ways: [F, K] each."""
    scores = F.normalize(asked, dim=-1) @ F.normalize(told, dim=-1).T / KEY_TEMPERATURE
    # The very same question in words alone, or about one drawing, is no other fact.
    names = [
        (fact.object, fact.relation, number < len(batch.shown)) for number, fact in enumerate(batch.facts)
    ]
    same = np.array([[one == other for other in names] for one in names]) & ~np.eye(len(names), dtype=bool)
    scores = scores.masked_fill(torch.from_numpy(same).to(scores.device), float("-inf"))
    wanted = torch.arange(len(names), device=scores.device)
    return 0.5 * (F.cross_entropy(scores, wanted) + F.cross_entropy(scores.T, wanted))


def _frame_potential(keys: Tensor) -> Tensor:
    """Mean squared cosine of two different keys, [F, K]: 1 / K where they are spread evenly."""
    cosines = F.normalize(keys, dim=-1) @ F.normalize(keys, dim=-1).T
    count = len(keys)
    return (cosines.square().sum() - count) / (count * (count - 1))


def binary_loss(probability: Tensor, target: float) -> Tensor:
    """Mean cross-entropy of probabilities [n] from one target, 0 or 1; 0 for none."""
    if not len(probability):
        return probability.new_zeros(())
    probability = probability.float().clamp(1e-6, 1 - 1e-6)
    return -(probability.log() if target else (1 - probability).log()).mean()


def _reading_loss(reading: Tensor, values: Tensor, batch: FactBatch) -> Tensor:
    """What is read is nearer to its own value's code than to those that say something else."""
    told = [fact.value for fact in batch.facts]
    own = np.flatnonzero(batch.written)
    scores = F.normalize(reading, dim=-1, eps=1e-6) @ values.T / READING_TEMPERATURE
    alike = np.array([[told[row] == other for other in told] for row in own])
    alike[np.arange(len(own)), own] = False
    scores = scores.masked_fill(torch.from_numpy(alike).to(scores.device), float("-inf"))
    return F.cross_entropy(scores, torch.from_numpy(own).to(scores.device))
