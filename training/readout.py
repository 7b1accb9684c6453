"""Stage `readout`: what makes a read into the decoder's slot, alone, on memories of codes that are computed once.

The encoder no longer changes, so that a step costs neither pictures nor codes: thousands of memories are drawn from a
bank. The readout learns what was written from what is read (mean squared error: the best guess given the read), and
with W_M to make the frozen decoder say it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from microvlm.errors import UserError
from microvlm.memory import batch_solution
from microvlm.model import MicroVLM
from microvlm.training.config import Recipe, StageConfig
from microvlm.training.data.emoji import EmojiData
from microvlm.training.data.facts import Fact
from microvlm.training.recall import ALIKE_SHARE, RecallTask
from microvlm.training.remember import encode_facts
from microvlm.training.texts import TextRows

MEMORIES = 16
"""Drawn in a step."""
SIZES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 1, 1, 1)
"""Facts in a memory, as shares of its slots: a full one reads worst."""
ANSWERED = 96
"""Readings that the decoder answers from in a step."""
RESTORE_WEIGHT = 40.0
"""Of the squared error of unit vectors, which is small against what the decoder's cross-entropy asks of the readout."""


class Written(NamedTuple):
    """Facts with a picture: codes [n, C] and keys [n, K], float32, and what is shown when they are asked for."""

    key: Tensor
    value: Tensor
    asked: Tensor
    prefixes: Tensor
    """float16 [n, k, H]."""
    facts: list[Fact]


class ReadoutTask(RecallTask):
    """The squared error of restored codes, and cross-entropy on the answers and on episodes."""

    trained = ("memory_projection",)

    def __init__(self, model: MicroVLM, rows: TextRows, recipe: Recipe, stage: StageConfig, emoji: EmojiData):
        if model.memory_projection.readout is None:
            raise UserError(f"stage '{stage.name}' needs a preset with a readout (memory.readout_size).")
        super().__init__(model, rows, recipe, stage, emoji)
        self.bank: Written | None = None

    def loss(self, helped: torch.nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        module = helped.model
        if self.bank is None:
            self.look(module)
            self.bank = self.encode(module)
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        drawn = [self._memory(rng) for _ in range(MEMORIES)]
        rows, readings = (torch.cat(part) for part in zip(*drawn, strict=True))
        written = self.bank.value[rows]
        restored = module.memory_projection.readout(readings)
        error = (restored - written).square().sum(-1).mean()
        some = torch.from_numpy(rng.permutation(len(rows))[:ANSWERED].copy())
        said = self._said(module, rows[some], readings[some])
        loss = said + RESTORE_WEIGHT * error
        metrics = {
            "facts": said.item(),
            "error": error.item(),
            "error_of_reads": (readings - written).square().sum(-1).mean().item(),
            "likeness": F.cosine_similarity(restored, written).mean().item(),
        }
        if self.episodes:
            episode = self.episode_loss(module, rng)
            loss = loss + episode * (self.episodes / ANSWERED) ** 0.5
            metrics["episodes"] = episode.item()
        return loss, metrics

    def _memory(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A memory of facts, side by side in the bank or from anywhere -> (which they are, what is read of each)."""
        assert self.bank is not None
        total = len(self.bank.key)
        count = min(total, max(1, round(self.model.config.memory.slots * float(rng.choice(SIZES)))))
        start = int(rng.integers(total - count + 1))
        drawn = start + np.arange(count) if rng.random() < 0.5 else rng.permutation(total)[:count]
        rows = torch.from_numpy(drawn.copy())
        variance = self.model.config.memory.observation_variance
        prior = self.model.memory_prior.detach().float()
        state = batch_solution(prior, self.bank.key[rows], self.bank.value[rows], variance)
        return rows, self.bank.asked[rows] @ state.mean[0]

    def _said(self, module: MicroVLM, rows: Tensor, readings: Tensor) -> Tensor:
        assert self.bank is not None
        facts = [self.bank.facts[row] for row in rows.tolist()]
        samples = [(fact.asked, fact.value) for fact in facts]
        embeds, mask, labels = self.rows.embedded(module, samples, self.bank.prefixes[rows].float())
        return self.cross_entropy(module, embeds, mask, labels, module.memory_projection(readings), None)

    @torch.no_grad()
    def encode(self, module: MicroVLM) -> Written:
        """`batch_size` draws of facts as a bank."""
        assert self.pictures is not None
        rng = np.random.default_rng(self.seed)
        parts: list[tuple[Tensor, ...]] = []
        facts: list[Fact] = []
        for _ in range(self.stage.batch_size):
            alike = self._alike_objects if rng.random() < ALIKE_SHARE else None
            batch = self.dealer.facts(rng, alike)._replace(told=[])
            prefixes = self.pictures.views(np.array([fact.object for fact in batch.shown], np.int64), rng)
            codes = encode_facts(module, batch, prefixes, self.rows)
            asked = prefixes[len(batch.shown) :].half()
            parts.append((codes.key, codes.value, codes.asked, asked))
            facts += batch.shown
        key, value, own, shown = (torch.cat(part) for part in zip(*parts, strict=True))
        return Written(key, value, own, shown, facts)
