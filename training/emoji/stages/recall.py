"""Stage `recall`: trains the memory encoder and the parts that turn a read into the decoder's memory slot.

Vision encoder, adapter, embedding and decoder are frozen. With the slot masked the model therefore answers exactly as
before, and prefix embeddings can be computed once (`batches/cached_prefixes.py`). A step then costs no pixels, which
makes thousands of steps affordable, over many more objects than there are emoji. Half of the batches consist of objects
that resemble each other, because a memory confuses those.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.errors import UserError
from microvlm.model.microvlm import MicroVLM
from microvlm.training.batches.episode_batches import EpisodeBatch, sample_episode_batch
from microvlm.training.emoji.batches.cached_prefixes import CachedPrefixes, load_or_encode
from microvlm.training.emoji.batches.drawing_sampler import DrawingSampler
from microvlm.training.emoji.batches.fact_batches import FactBatch, FactSampler
from microvlm.training.emoji.data.drawings import load_drawings
from microvlm.training.emoji.losses.fact_loss import FactHeads, fact_losses
from microvlm.training.emoji.stages.emoji_task import EmojiTask
from microvlm.training.losses.episode_loss import episode_losses
from microvlm.training.losses.loss_terms import answer_loss
from microvlm.training.recipe import StageConfig
from microvlm.training.stages.task import StageInputs, WholeModelTask

STRENGTH = 0.8
"""Augmentation of the views: turned by up to 20 degrees, on any ground."""
VIEWS = 4
ALIKE_SHARE = 0.5
"""Share of the batches whose objects come in groups of `ALIKE_LENGTH` that resemble each other."""
ALIKE_LENGTH, NEAREST = 4, 12


class EpisodeImages(NamedTuple):
    """Episodes over n images, given as prefix embeddings."""

    captions: list[str]
    prefixes: Tensor
    """float32 [n, k, H]."""
    episodes: EpisodeBatch


class RecallBatch(NamedTuple):
    """One batch of a `recall` stage."""

    facts: FactBatch
    """Without views."""
    prefixes: Tensor
    """float32 [2 * len(facts.pictured), k, H]: prefixes of the views that are written, then of those asked about."""
    episodes: EpisodeImages | None


class ModelWithFactHeads(nn.Module):
    """The model with the fact heads, which exist in training only."""

    def __init__(self, model: MicroVLM):
        super().__init__()
        self.model = model
        self.facts = FactHeads(model)


class RecallTask(EmojiTask, WholeModelTask):
    """The losses of facts and episodes, on the memory encoder, the readout and W_M."""

    mixture_kinds = ("fact", "episode")

    def __init__(self, inputs: StageInputs):
        super().__init__(inputs)
        stage = self.stage
        self.with_heads = ModelWithFactHeads(self.model)
        self.module = self.with_heads
        self.cross_entropy = answer_loss(stage.label_smoothing)
        self.episodes = stage.count_of("episode")
        self.sampler = DrawingSampler(self.emoji, self.recipe.vendor_weights, seen_share=1.0)
        drawings = None
        if stage.drawing_share:
            others = load_drawings(self.emoji.folder)
            drawings = np.asarray(others.pixels[others.trained])
        self.fact_sampler = FactSampler(
            self.emoji,
            self.sampler,
            stage.count_of("fact"),
            STRENGTH,
            drawings=drawings,
            drawing_share=stage.drawing_share,
        )
        self._cache: CachedPrefixes | None = None
        self._alike: np.ndarray | None = None
        self.model.requires_grad_(False)
        for part in self._trained_parts():
            part.requires_grad_(True)

    @classmethod
    def check(cls, stage: StageConfig) -> None:
        super().check(stage)
        if not stage.count_of("fact"):
            raise UserError(f"stage '{stage.name}' has no facts to recall: give its mixture a share of fact.")

    def _trained_parts(self) -> list[nn.Module]:
        return [self.model.memory_encoder, self.model.memory_projection]

    def parameter_groups(self) -> list[dict]:
        modules = [*self._trained_parts(), self.with_heads.facts.answer, self.with_heads.facts.read_out]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        return [{"params": parameters, "lr": self.stage.learning_rate}]

    def prepare(self) -> None:
        """Encode the views of every drawing, and rank for each drawing the others by likeness."""
        self._cache = load_or_encode(
            self.emoji.folder,
            self.model,
            self.sampler,
            self.fact_sampler.rows,
            len(self.emoji.captions),
            self.fact_sampler.drawings,
            VIEWS,
            STRENGTH,
            self.recipe.seed,
        )
        self._alike = nearest_drawings(self._cache)

    @property
    def cache(self) -> CachedPrefixes:
        assert self._cache is not None, "prepare() comes first"
        return self._cache

    @property
    def alike(self) -> np.ndarray:
        """int64 [D, NEAREST]: for each drawing those of other objects that resemble it most."""
        assert self._alike is not None, "prepare() comes first"
        return self._alike

    def draw(self, generator: torch.Generator) -> RecallBatch:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        facts = self.fact_sampler.sample_facts(
            rng, self.alike_objects if rng.random() < ALIKE_SHARE else None
        )
        objects = np.array([fact.object for fact in facts.pictured], np.int64)
        prefixes = self.cache.views(objects, rng)
        return RecallBatch(facts, prefixes, self._draw_episodes(rng) if self.episodes else None)

    def _draw_episodes(self, rng: np.random.Generator) -> EpisodeImages:
        rows = rng.choice(self.sampler.seen_rows, 2 * self.episodes)
        prefixes = self.cache.views(rows, rng)[: len(rows)]
        captions = [self.emoji.captions[row] for row in rows]
        return EpisodeImages(captions, prefixes, sample_episode_batch(rng, len(rows)))

    def loss(self, module: ModelWithFactHeads, batch: RecallBatch) -> tuple[Tensor, dict[str, Tensor]]:
        model = module.model
        device = model.memory_prior.device
        facts = fact_losses(
            model,
            module.facts,
            batch.facts,
            batch.prefixes.to(device),
            self.rows,
            self.cross_entropy,
            teach_unknown=False,
        )
        loss, metrics = facts.loss, dict(facts.metrics)
        if batch.episodes:
            captions, prefixes, episodes = batch.episodes
            episode = episode_losses(
                model, prefixes.to(device), captions, episodes, self.rows, self.cross_entropy
            ).loss
            loss = loss + episode * (self.episodes / len(batch.facts.pictured)) ** 0.5
            metrics["episodes"] = episode
        for name in ("gate", "opened", "closed"):
            # The scope detector learns in a stage of its own.
            metrics.pop(name)
        return loss, metrics

    def alike_objects(
        self, rng: np.random.Generator, pictured_count: int, text_count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Groups of objects, each a random one and some that resemble it; and emoji for facts in words alone."""
        objects = self.cache.objects
        groups = -(-pictured_count // ALIKE_LENGTH)
        first = rng.integers(len(objects), size=groups)
        others = np.stack([rng.permutation(self.alike[row])[: ALIKE_LENGTH - 1] for row in first])
        drawings = np.concatenate([first[:, None], others], 1).ravel()[:pictured_count]
        return objects[drawings], rng.choice(self.fact_sampler.rows, text_count)


def nearest_drawings(cache: CachedPrefixes, count: int = NEAREST) -> np.ndarray:
    """int64 [D, count]: for each drawing those of other objects with the most similar mean prefix.

    The vision encoder is frozen, so a resumed run ranks as an unbroken one.
    """
    prefixes = cache.prefixes.float().mean(1).flatten(1)
    prefixes = F.normalize(prefixes - prefixes.mean(0), dim=-1)
    objects = torch.from_numpy(cache.objects)
    others = len(objects) - int(cache.number.max())
    nearest = []
    for chunk, own in zip(prefixes.split(512), objects.split(512), strict=True):
        likeness = (chunk @ prefixes.T).masked_fill(own[:, None] == objects, float("-inf"))
        nearest.append(likeness.topk(min(count, others), 1).indices)
    return torch.cat(nearest).numpy()
