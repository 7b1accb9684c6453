"""Stage `vlm`: trains the whole model on captions, scene questions, facts and episodes that only the memory can answer.

Every batch has rows with the memory slot masked, rows that see an unrelated memory, and rows that need it, so that the
model works in all three cases (Larimar, arXiv 2403.11901, section 3.3).
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from microvlm.errors import UserError
from microvlm.model.checkpoint import load_strictly
from microvlm.model.memory_algebra import MemoryState
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_ops import full_precision
from microvlm.model.vision import normalise
from microvlm.training.batches.sample_texts import IGNORED
from microvlm.training.emoji.batches.emoji_grids import patch_labels, scene_labels
from microvlm.training.emoji.batches.vlm_batches import SAMPLE_KINDS, BatchCounts, VLMBatch, VLMBatchSampler
from microvlm.training.emoji.data.scenes import read_scene_objects
from microvlm.training.emoji.losses.attention_guidance import AttentionTap
from microvlm.training.emoji.losses.fact_loss import DRAWING_WEIGHT, FactHeads, FactLosses, fact_losses
from microvlm.training.emoji.losses.picture_losses import (
    guidance_loss,
    name_tokens,
    prefix_naming_loss,
    question_lookups,
    recognition_loss,
)
from microvlm.training.emoji.stages.emoji_task import EmojiTask
from microvlm.training.losses.episode_loss import episode_losses
from microvlm.training.losses.loss_terms import answer_loss, binary_loss
from microvlm.training.recipe import StageConfig
from microvlm.training.stages.task import StageInputs, WholeModelTask

SCOPE_WEIGHT = 0.1
FACT_SCOPE_WEIGHT = 0.5


class ModelWithHeads(nn.Module):
    """The model with heads that exist in training only: the object under each patch, the picture's emoji, facts."""

    def __init__(self, model: MicroVLM, classes: int):
        super().__init__()
        self.model = model
        width = model.config.vision.hidden_size
        self.name_patch = nn.Linear(width, 1 + classes)
        self.classify = nn.Linear(width, classes)
        self.facts = FactHeads(model)


class VLMTask(EmojiTask, WholeModelTask):
    """Cross-entropy of answers, binary cross-entropy of the scope detector, the losses of facts, and, while the vision
    encoder learns, recognition losses on patches and pictures of seen emoji.
    """

    mixture_kinds = SAMPLE_KINDS

    def __init__(self, inputs: StageInputs):
        super().__init__(inputs)
        emoji, stage = self.emoji, self.stage
        self.with_heads = ModelWithHeads(self.model, int(emoji.is_seen.sum()))
        self.module = self.with_heads
        self.label_of = np.full(len(emoji.hexcodes), IGNORED)
        self.label_of[np.flatnonzero(emoji.is_seen)] = np.arange(emoji.is_seen.sum())
        self.object_labels = self.label_of[[emoji.index(hexcode) for hexcode, _ in read_scene_objects()]]
        self.sampler = VLMBatchSampler(
            emoji, self.recipe, stage, self.label_of, self.config.vision.image_size
        )
        self.counts = self.sampler.counts
        self.name_tokens = name_tokens(self.rows.processor)
        self.cross_entropy = answer_loss(stage.label_smoothing)
        self.model.vision.requires_grad_(stage.vision_learning_rate > 0)

    @classmethod
    def check(cls, stage: StageConfig) -> None:
        super().check(stage)
        counts = BatchCounts.of(stage)
        if not counts.direct or not counts.episodes:
            raise UserError(
                f"stage '{stage.name}': its mixture gives a batch of {stage.batch_size} no caption or scene, or no "
                "episode: a vlm stage needs both kinds."
            )

    def parameter_groups(self) -> list[dict]:
        vision = [p for p in self.model.vision.parameters() if p.requires_grad]
        inside = {id(p) for p in self.model.vision.parameters()}
        rest = [p for p in self.module.parameters() if id(p) not in inside]
        groups = [{"params": rest, "lr": self.stage.learning_rate}]
        if vision:
            groups.append({"params": vision, "lr": self.stage.vision_learning_rate})
        return groups

    def continue_from(self, tensors: dict[str, Tensor], source: str) -> None:
        """A whole model, or the vision encoder and the emoji head of a distilled student."""
        if set(tensors) == set(self.model.state_dict()):
            super().continue_from(tensors, source)
            return
        for part, module in (("vision.", self.model.vision), ("classify.", self.with_heads.classify)):
            own = {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
            load_strictly(module, own, source)

    def draw(self, generator: torch.Generator) -> VLMBatch:
        return self.sampler.sample(generator)

    def loss(self, module: ModelWithHeads, batch: VLMBatch) -> tuple[Tensor, dict[str, Tensor]]:
        model, stage, counts = module.model, self.stage, self.counts
        pixels = batch.pixels.to(model.memory_prior.device, non_blocking=True)
        with torch.set_grad_enabled(stage.vision_learning_rate > 0):
            features = model.vision(normalise(pixels, self.config.vision))
        recognition = self._recognition(module, features, batch)
        prefixes = model.adapter(features[: len(features) - counts.grids])
        episode = episode_losses(
            model,
            prefixes[counts.direct : counts.episode_end],
            [self.emoji.captions[row] for row in batch.rows[counts.captions :]],
            batch.episodes,
            self.rows,
            self.cross_entropy,
        )
        states = [episode.state]
        facts = None
        if batch.facts:
            facts = fact_losses(
                model,
                module.facts,
                batch.facts,
                prefixes[counts.episode_end :],
                self.rows,
                self.cross_entropy,
            )
            states.append(facts.state)
        with AttentionTap(model.decoder) if stage.guidance_weight else nullcontext() as tap:
            answers, distractor_scope = self._direct_losses(model, prefixes[: counts.direct], batch, states)
        scope = 0.5 * (episode.scope + distractor_scope)
        loss = (
            answers + episode.loss * (counts.episodes / max(1, counts.direct)) ** 0.5 + SCOPE_WEIGHT * scope
        )
        metrics = {"answers": answers, "episodes": episode.loss, "scope": scope}
        if facts:
            loss = loss + facts.loss + FACT_SCOPE_WEIGHT * facts.scope
            metrics |= facts.metrics
        loss, metrics = self._add_scene_losses(model, prefixes, batch, tap, loss, metrics)
        return self._add_vision_losses(module, features, batch, facts, recognition, loss, metrics)

    def _add_scene_losses(
        self,
        model: MicroVLM,
        prefixes: Tensor,
        batch: VLMBatch,
        tap: AttentionTap | None,
        loss: Tensor,
        metrics: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the losses that name prefix embeddings and guide attention, if the stage weights them."""
        if self.stage.naming_weight:
            scenes = [scene for scene, _ in batch.scene_questions]
            over_scenes = prefixes[self.counts.captions : self.counts.direct]
            naming_loss = prefix_naming_loss(model, over_scenes, scenes, self.name_tokens)
            loss = loss + self.stage.naming_weight * naming_loss
            metrics["named"] = naming_loss
        if tap is not None:
            lookups = question_lookups(
                self.rows, batch.scene_questions, self.counts.captions, self.name_tokens, self.config
            )
            guided = guidance_loss(tap, *lookups, prefixes.device)
            loss = loss + self.stage.guidance_weight * guided
            metrics["guided"] = guided
        return loss, metrics

    def _add_vision_losses(
        self,
        module: ModelWithHeads,
        features: Tensor,
        batch: VLMBatch,
        facts: FactLosses | None,
        recognition: Tensor | None,
        loss: Tensor,
        metrics: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the losses that only the vision encoder learns from; none while it is frozen."""
        if recognition is None:
            return loss, metrics
        if facts and batch.facts:
            leading, start = self.config.vision.num_leading_tokens, self.counts.episode_end
            views = features[start : start + 2 * len(batch.facts.pictured)]
            drawings = module.facts.drawings(views, leading, batch.facts)
            loss = loss + DRAWING_WEIGHT * drawings
            metrics["drawings"] = drawings
        return loss + recognition, metrics | {"shown": recognition}

    def _recognition(self, module: ModelWithHeads, features: Tensor, batch: VLMBatch) -> Tensor | None:
        """Recognition losses on patches and whole pictures; None while the vision encoder is frozen."""
        if self.stage.vision_learning_rate == 0:
            return None
        counts, vision = self.counts, self.config.vision
        side = vision.image_size // vision.patch_size
        small = torch.cat(
            [features[counts.captions : counts.direct], features[len(features) - counts.grids :]]
        )
        scenes = [scene for scene, _ in batch.scene_questions]
        patch_targets = np.concatenate(
            [
                scene_labels(scenes, self.object_labels, side),
                patch_labels(batch.grids.labels, batch.grids.places, side),
            ]
        )
        whole = torch.cat([features[: counts.captions, 0], features[counts.direct : counts.episode_end, 0]])
        return recognition_loss(
            module.name_patch(small[:, vision.num_leading_tokens :]),
            patch_targets,
            module.classify(whole),
            self.label_of[batch.rows],
        )

    def _direct_losses(
        self, model: MicroVLM, prefixes: Tensor, batch: VLMBatch, states: list[MemoryState]
    ) -> tuple[Tensor, Tensor]:
        """Answer loss of captions and scenes, and the scope detector's loss on the rows that see a distractor memory.

        No memory has anything to say about these rows; those that see one must ignore it.
        """
        embeds, mask, labels = self.rows.embedded(model, batch.samples, prefixes)
        device, count = embeds.device, len(batch.samples)
        rows = torch.from_numpy(batch.distractors.rows).to(device)
        candidates = [
            (state, torch.from_numpy(indices).to(device))
            for state, indices in zip(states, batch.distractors.memories, strict=True)
        ]
        chosen = torch.from_numpy(batch.distractors.chosen).to(device)
        memories = (
            torch.cat([s[n].detach()[indices] for s, indices in candidates])[chosen] for n in range(2)
        )
        # The query is the whole prompt, as at inference; its last token already has the answer's first as its label.
        query_mask = mask[rows] * (labels[rows] != IGNORED).cumsum(1).le(1)
        latent, key = model.memory_encode(embeds[rows].detach(), query_mask)
        with full_precision(key.device.type):
            _, scope, _, slot = model.memory_read(key.float(), latent.float(), *memories)
        slot_visible = torch.zeros(count, dtype=torch.long, device=device).index_fill(0, rows, 1)
        full_slot = [(_scatter(k, rows, count), _scatter(v, rows, count)) for k, v in slot]
        answers = self.cross_entropy(model, embeds, mask, labels, full_slot, slot_visible)
        return answers, binary_loss(scope, 0.0)


def _scatter(part: Tensor, rows: Tensor, count: int) -> Tensor:
    """[r, heads, 1, D] at `rows` of a zero tensor [count, heads, 1, D]."""
    return part.new_zeros(count, *part.shape[1:]).index_copy(0, rows, part)
