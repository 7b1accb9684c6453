"""Stage `vlm`: the whole model on captions, scene questions and episodes that only the memory can answer.

Every batch has rows with the memory slot masked, rows that see an unrelated memory, and rows that need it, so that
the model runs in all three (Larimar, arXiv 2403.11901, section 3.3).
"""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.decoder import Cache
from microvlm.memory import MemoryState
from microvlm.model import MicroVLM
from microvlm.ordinals import ORDINALS, ordinal_question
from microvlm.training.config import Recipe, StageConfig
from microvlm.training.data.compose import augment_emoji, compose_scenes
from microvlm.training.data.emoji import EmojiData
from microvlm.training.data.scenes import KINDS, Scene, read_scene_objects, sample_question
from microvlm.training.distill import DrawingSampler
from microvlm.training.texts import CAPTION_PROMPTS, IGNORED, TextRows
from microvlm.vision import normalise

DISTRACTOR_SHARE = 0.2
"""Share of caption and scene rows that see a memory of something else."""
SCOPE_WEIGHT = 0.1
MAX_EPISODE = 8
PATCH_WEIGHT, CLASSIFY_WEIGHT = 1.0, 0.3


def patch_labels(scenes: list[Scene], side: int) -> np.ndarray:
    """int64 [B, side * side]: 1 + the object whose drawing holds the patch's centre, 0 for the ground."""
    centre = (np.arange(side) + 0.5) / side
    labels = np.zeros((len(scenes), side, side), np.int64)
    for image, scene in zip(labels, scenes, strict=True):
        for placed in scene.objects:
            rows = np.abs(centre - placed.y) < placed.size / 2
            columns = np.abs(centre - placed.x) < placed.size / 2
            image[np.ix_(rows, columns)] = 1 + placed.object
    return labels.reshape(len(scenes), -1)


class Episodes(NamedTuple):
    """What the episodes of a batch gave."""

    loss: Tensor
    scope: Tensor
    state: MemoryState
    """The memories after the last write, for other rows to be distracted by."""


class Helped(nn.Module):
    """The model with two heads that only training needs: what each patch shows, and which emoji the picture is."""

    def __init__(self, model: MicroVLM, patch_classes: int, classes: int):
        super().__init__()
        self.model = model
        width = model.config.vision.hidden_size
        self.name_patch = nn.Linear(width, patch_classes)
        self.classify = nn.Linear(width, classes)


class VLMTask:
    """Cross-entropy on answers, the scope detector's binary cross-entropy, and, while the vision encoder learns, the
    name of the object under each patch of a scene and of the emoji in a picture (of seen emoji alone)."""

    def __init__(self, model: MicroVLM, rows: TextRows, recipe: Recipe, stage: StageConfig, emoji: EmojiData):
        self.model, self.rows, self.stage, self.emoji = model, rows, stage, emoji
        self.config = model.config
        self.module = Helped(model, len(read_scene_objects()) + 1, int(emoji.seen.sum()))
        self.label_of = np.full(len(emoji.hexcodes), IGNORED)
        self.label_of[np.flatnonzero(emoji.seen)] = np.arange(emoji.seen.sum())
        # Captions are learned for seen emoji alone.
        self.sampler = DrawingSampler(emoji, recipe.vendor_weights, seen_share=1.0)
        # As a question holds them: "where is the lion?".
        words = [rows.processor.text_ids(" " + caption)[0] for _, caption in read_scene_objects()]
        self.name_tokens = np.array(words, np.int64)
        counts = {kind: round(stage.batch_size * share) for kind, share in stage.mixture.items()}
        self.captions, self.scenes, self.episodes = (
            counts.get(k, 0) for k in ("caption", "scene", "episode")
        )
        model.vision.requires_grad_(stage.vision_learning_rate > 0)

    def parameter_groups(self) -> list[dict]:
        vision = [p for p in self.model.vision.parameters() if p.requires_grad]
        inside = {id(p) for p in self.model.vision.parameters()}
        rest = [p for p in self.module.parameters() if id(p) not in inside]
        groups = [{"params": rest, "lr": self.stage.learning_rate}]
        if vision:
            groups.append({"params": vision, "lr": self.stage.vision_learning_rate})
        return groups

    def loss(self, helped: Helped, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        module = helped.model
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        drawn = self.sampler.rows(self.captions + 2 * self.episodes, generator)
        with torch.autocast("cpu", enabled=False):
            views = augment_emoji(
                self.sampler.pixels(drawn, self.sampler.vendors_of(drawn, generator)),
                generator,
                self.stage.augment_strength,
            )
            kinds = rng.choice(len(KINDS), self.scenes, p=[self.stage.scene_kinds[kind] for kind in KINDS])
            asked = [sample_question(rng, KINDS[kind]) for kind in kinds]
            scenes = compose_scenes([s for s, _ in asked], self.emoji, generator=generator, strength=1.0)
        pixels = normalise(
            torch.cat([views[: self.captions], scenes, views[self.captions :]]), self.config.vision
        )
        features = module.vision(pixels.to(next(module.parameters()).device))
        prefixes = module.adapter(features)
        split = self.captions + self.scenes
        shown = self._shown(helped, features, drawn, [scene for scene, _ in asked])
        names = [self.emoji.captions[row] for row in drawn]
        direct = self._captions(names[: self.captions], rng) + [(q.text, q.answer) for _, q in asked]
        episode = self._episodes(module, prefixes[split:], names[self.captions :], rng)
        looked, scope_off = self._direct(module, prefixes[:split], direct, episode.state, rng)
        scope = 0.5 * (episode.scope + scope_off)
        loss = looked + episode.loss * (self.episodes / max(1, split)) ** 0.5 + SCOPE_WEIGHT * scope
        metrics = {"answers": looked.item(), "episodes": episode.loss.item(), "scope": scope.item()}
        if self.stage.naming_weight:
            named = self._name_prefixes(
                module, prefixes[self.captions : split], [scene for scene, _ in asked]
            )
            loss = loss + self.stage.naming_weight * named
            metrics["named"] = named.item()
        if shown is None:
            return loss, metrics
        return loss + shown, metrics | {"shown": shown.item()}

    def _name_prefixes(self, module: MicroVLM, prefixes: Tensor, scenes: list[Scene]) -> Tensor:
        """Cross-entropy of the tied head on the prefix embeddings that start over an object, against its name's token.

        A picture's place then holds what the text calls it, so that a question's word can find it by likeness.
        """
        leading = self.config.vision.num_leading_tokens
        grid = isqrt(self.config.prefix_tokens - leading)
        under = patch_labels(scenes, grid)
        image, cell = np.nonzero(under)
        wanted = torch.from_numpy(self.name_tokens[under[image, cell] - 1]).to(prefixes.device)
        logits = module.embedding.head(prefixes[image, leading + cell])
        return F.cross_entropy(logits.float(), wanted)

    def _shown(
        self, helped: Helped, features: Tensor, drawn: np.ndarray, scenes: list[Scene]
    ) -> Tensor | None:
        """Cross-entropy of the two helping heads; None while the vision encoder is frozen."""
        if self.stage.vision_learning_rate == 0:
            return None
        leading = self.config.vision.num_leading_tokens
        side = self.config.vision.image_size // self.config.vision.patch_size
        split = self.captions + self.scenes
        patches = helped.name_patch(features[self.captions : split, leading:]).float()
        under = torch.from_numpy(patch_labels(scenes, side)).to(features.device)
        named = F.cross_entropy(patches.flatten(0, 1), under.flatten())
        whole = torch.cat([features[: self.captions, 0], features[split:, 0]])
        labels = torch.from_numpy(self.label_of[drawn]).to(features.device)
        classified = F.cross_entropy(helped.classify(whole).float(), labels, label_smoothing=0.1)
        return PATCH_WEIGHT * named + CLASSIFY_WEIGHT * classified

    def _captions(self, names: list[str], rng: np.random.Generator) -> list[tuple[str, str]]:
        """Mostly the prompt that the command line uses, sometimes another way to ask."""
        other = rng.integers(1, len(CAPTION_PROMPTS), len(names)) * (rng.random(len(names)) < 0.2)
        return [(CAPTION_PROMPTS[k], name) for k, name in zip(other, names, strict=True)]

    def _embed(self, module: MicroVLM, samples: list[tuple[str, str]], prefixes: Tensor | None) -> tuple:
        """Embedded rows, mask and labels of prompts with (or without) one image each."""
        device = next(module.parameters()).device
        ids, mask, labels = (t.to(device) for t in self.rows.rows(samples, prefixes is not None))
        if prefixes is None:
            return module.embed(ids), mask, labels
        return module.place_images(ids, self.rows.processor.image_id, prefixes), mask, labels

    def _cross_entropy(
        self, module: MicroVLM, embeds: Tensor, mask: Tensor, labels: Tensor, slot: Cache, seen: Tensor | None
    ) -> Tensor:
        wanted = labels != IGNORED
        logits = module(embeds, mask, slot, seen, wanted)
        return F.cross_entropy(logits.float(), labels[wanted], label_smoothing=self.stage.label_smoothing)

    def _direct(
        self,
        module: MicroVLM,
        prefixes: Tensor,
        samples: list[tuple[str, str]],
        state: MemoryState,
        rng: np.random.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Captions and scenes. The memory has nothing to say; some rows see it all the same and must ignore it."""
        embeds, mask, labels = self._embed(module, samples, prefixes)
        count = max(1, round(len(samples) * DISTRACTOR_SHARE))
        rows = torch.from_numpy(rng.permutation(len(samples))[:count].copy()).to(embeds.device)
        other = torch.from_numpy(rng.integers(0, state.mean.shape[0], count)).to(embeds.device)
        # The query is the whole prompt, as at inference; its last token already has the answer's first as its label.
        query = mask[rows] * (labels[rows] != IGNORED).cumsum(1).le(1)
        code, key = module.memory_encode(embeds[rows].detach(), query)
        with torch.autocast("cpu", enabled=False):
            _, scope, _, slot = module.memory_read(key.float(), code.float(), state.mean.detach()[other])
        seen = torch.zeros(len(samples), dtype=torch.long, device=embeds.device).index_fill(0, rows, 1)
        full = [(_scatter(k, rows, len(samples)), _scatter(v, rows, len(samples))) for k, v in slot]
        return self._cross_entropy(module, embeds, mask, labels, full, seen), _bce(scope, 0.0)

    def _episodes(
        self, module: MicroVLM, prefixes: Tensor, names: list[str], rng: np.random.Generator
    ) -> Episodes:
        """Two to eight images written one after the other, each under the question of its place; one is asked for.

        Every image of the batch is encoded once and stands in several episodes.
        """
        told = [(CAPTION_PROMPTS[0], name) for name in names]
        values, value_mask, _ = self._embed(module, told, prefixes)
        codes, _ = module.memory_encode(values, value_mask)
        texts = [(ordinal_question(step), "") for step in range(len(ORDINALS))]
        questions, question_mask, _ = self._embed(module, texts, None)
        query_codes, keys = module.memory_encode(questions, question_mask)
        length = int(rng.integers(2, min(MAX_EPISODE, len(names)) + 1))
        shown = np.stack([rng.permutation(len(names))[:length] for _ in names])
        asked = rng.integers(0, length, len(names))
        state = MemoryState(*(t.float() for t in module.memory_prior_state(len(names))))
        with torch.autocast("cpu", enabled=False):
            codes, keys, query_codes = codes.float(), keys.float(), query_codes.float()
            for step in range(length):
                key = keys[step].expand(len(names), -1)
                state = MemoryState(*module.memory_write(key, codes[shown[:, step]], *state))
            _, scope, _, slot = module.memory_read(keys[asked], query_codes[asked], state.mean)
        answers = [names[row[step]] for row, step in zip(shown, asked, strict=True)]
        samples = [(ordinal_question(int(step)), name) for step, name in zip(asked, answers, strict=True)]
        embeds, mask, labels = self._embed(module, samples, None)
        loss = self._cross_entropy(module, embeds, mask, labels, slot, None)
        return Episodes(loss, _bce(scope, 1.0), state)


def _scatter(part: Tensor, rows: Tensor, count: int) -> Tensor:
    """[r, heads, 1, D] at `rows` of a zero [count, heads, 1, D]."""
    return part.new_zeros(count, *part.shape[1:]).index_copy(0, rows, part)


def _bce(probability: Tensor, target: float) -> Tensor:
    probability = probability.float().clamp(1e-6, 1 - 1e-6)
    return -(probability.log() if target else (1 - probability).log()).mean()
