"""Stage `recall`: the memory's own parts alone, its encoder and what makes a read into the decoder's slot.

Vision, adapter, embedding and decoder are frozen, so that with the slot masked the model says to the letter what it
said before, and a step costs no pixels: pictures are seen once (`pictures.py`). Thousands of steps are then
affordable, over many more objects than are drawn as emoji. Objects that resemble each other are dealt into one batch,
because those are the ones that a memory confuses.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.errors import UserError
from microvlm.model.microvlm import MicroVLM
from microvlm.training.batches.cached_prefixes import Pictures, see_once
from microvlm.training.batches.drawing_sampler import DrawingSampler
from microvlm.training.batches.fact_batches import FactDealer
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.data.drawings import load_drawings
from microvlm.training.data.emoji import EmojiData
from microvlm.training.losses.episode_loss import answer_loss, recall_episodes
from microvlm.training.losses.fact_loss import FactHeads, remember
from microvlm.training.recipe import Recipe, StageConfig

STRENGTH = 0.8
"""Of the views: turned by up to 20 degrees, on any ground."""
VIEWS = 4
ALIKE_SHARE = 0.5
"""Of the batches whose objects come in groups of `ALIKE_LENGTH` that resemble each other."""
ALIKE_LENGTH, NEAREST = 4, 12


class Helped(nn.Module):
    """The model with the heads that only training needs."""

    def __init__(self, model: MicroVLM):
        super().__init__()
        self.model = model
        self.facts = FactHeads(model)


class RecallTask:
    """The losses of `remember` and of episodes, on the memory encoder, the readout and W_M."""

    def __init__(self, model: MicroVLM, rows: TextRows, recipe: Recipe, stage: StageConfig, emoji: EmojiData):
        self.model, self.rows, self.stage, self.emoji = model, rows, stage, emoji
        self.seed = recipe.seed
        self.module = Helped(model)
        self.cross_entropy = answer_loss(stage.label_smoothing)
        counts = {kind: round(stage.batch_size * share) for kind, share in stage.mixture.items()}
        if not counts.get("fact"):
            raise UserError(f"stage '{stage.name}' has no facts to recall: give its mixture a share of fact.")
        self.episodes = counts.get("episode", 0)
        self.sampler = DrawingSampler(emoji, recipe.vendor_weights, seen_share=1.0)
        drawings = None
        if stage.drawing_share:
            others = load_drawings(emoji.folder)
            drawings = np.asarray(others.pixels[others.trained])
        self.dealer = FactDealer(
            emoji,
            self.sampler,
            counts["fact"],
            STRENGTH,
            drawings=drawings,
            drawing_share=stage.drawing_share,
        )
        self.pictures: Pictures | None = None
        self.alike: np.ndarray | None = None
        model.requires_grad_(False)
        for part in self._parts():
            part.requires_grad_(True)

    def _parts(self) -> list[nn.Module]:
        return [self.model.memory_encoder, self.model.memory_projection]

    def parameter_groups(self) -> list[dict]:
        parts = [parameter for part in self._parts() for parameter in part.parameters()]
        heads = (self.module.facts.answer, self.module.facts.read_out)
        named = [parameter for head in heads for parameter in head.parameters()]
        return [{"params": [*parts, *named], "lr": self.stage.learning_rate}]

    def draw(self, generator: torch.Generator) -> int:
        return int(torch.randint(2**31, (1,), generator=generator))

    def loss(self, helped: Helped, drawn: int) -> tuple[Tensor, dict[str, Tensor]]:
        module = helped.model
        if self.pictures is None:
            self.look(module)
        assert self.pictures is not None
        rng = np.random.default_rng(drawn)
        alike = self._alike_objects if rng.random() < ALIKE_SHARE else None
        facts = self.dealer.facts(rng, alike)
        objects = np.array([fact.object for fact in facts.shown], np.int64)
        prefixes = self.pictures.views(objects, rng).to(module.memory_prior.device)
        recalled = remember(
            module, helped.facts, facts, prefixes, self.rows, self.cross_entropy, unknown_too=False
        )
        metrics = dict(recalled.metrics)
        loss = recalled.loss
        if self.episodes:
            episode = self.episode_loss(module, rng)
            loss = loss + episode * (self.episodes / len(facts.shown)) ** 0.5
            metrics["episodes"] = episode
        for name in ("gate", "opened", "closed"):
            # The scope detector learns in a stage of its own.
            metrics.pop(name)
        return loss, metrics

    def episode_loss(self, module: MicroVLM, rng: np.random.Generator) -> Tensor:
        assert self.pictures is not None
        rows = rng.choice(self.sampler.seen_rows, 2 * self.episodes)
        names = [self.emoji.captions[row] for row in rows]
        images = self.pictures.views(rows, rng)[: len(rows)].to(module.memory_prior.device)
        return recall_episodes(module, images, names, self.rows, self.cross_entropy, rng).loss

    def look(self, module: MicroVLM) -> None:
        """See every picture, and find which objects resemble each other."""
        dealer, behind = self.dealer, len(self.emoji.captions)
        self.pictures = see_once(
            self.emoji.folder,
            module,
            self.sampler,
            dealer.rows,
            behind,
            dealer.drawings,
            VIEWS,
            STRENGTH,
            self.seed,
        )
        self.alike = self._nearest()

    def _nearest(self) -> np.ndarray:
        """int64 [D, NEAREST]: for each drawing those of other objects that look most alike.

        By what vision makes of them, which does not learn here: a resumed run deals what an unbroken one would.
        """
        assert self.pictures is not None
        seen = self.pictures.prefixes.float().mean(1).flatten(1)
        seen = F.normalize(seen - seen.mean(0), dim=-1)
        objects = torch.from_numpy(self.pictures.objects)
        others = len(objects) - int(self.pictures.number.max())
        found = []
        for some, own in zip(seen.split(512), objects.split(512), strict=True):
            likeness = (some @ seen.T).masked_fill(own[:, None] == objects, float("-inf"))
            found.append(likeness.topk(min(NEAREST, others), 1).indices)
        return torch.cat(found).numpy()

    def _alike_objects(
        self, rng: np.random.Generator, shown: int, told: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Groups of objects, each one that was drawn and some of those that resemble it."""
        assert self.pictures is not None
        assert self.alike is not None
        objects = self.pictures.objects
        groups = -(-shown // ALIKE_LENGTH)
        one = rng.integers(len(objects), size=groups)
        others = np.stack([rng.permutation(self.alike[row])[: ALIKE_LENGTH - 1] for row in one])
        drawn = np.concatenate([one[:, None], others], 1).ravel()[:shown]
        return objects[drawn], rng.choice(self.dealer.rows, told)
