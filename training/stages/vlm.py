"""Stage `vlm`: the whole model on captions, scene questions and episodes that only the memory can answer.

Every batch has rows with the memory slot masked, rows that see an unrelated memory, and rows that need it, so that
the model runs in all three (Larimar, arXiv 2403.11901, section 3.3).
"""

from __future__ import annotations

from contextlib import nullcontext
from math import isqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.inputs.processor import Processor
from microvlm.model.memory_algebra import MemoryState
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_ops import full_precision
from microvlm.model.vision import normalise
from microvlm.training.batches.drawing_sampler import DrawingSampler
from microvlm.training.batches.fact_batches import FactBatch, FactDealer
from microvlm.training.batches.patch_pictures import Crowd, draw_crowd, patch_labels, scene_labels
from microvlm.training.batches.sample_texts import CAPTION_PROMPTS, IGNORED, TextRows
from microvlm.training.data.drawings import load_drawings
from microvlm.training.data.emoji import EmojiData
from microvlm.training.data.scene_drawing import compose_scenes
from microvlm.training.data.scenes import KINDS, Question, Scene, read_scene_objects, sample_question
from microvlm.training.data.views import augment_emoji
from microvlm.training.losses.attention_guidance import ANSWER_LAYER, WORD_LAYER, AttentionTap, Lookups
from microvlm.training.losses.episode_loss import answer_loss, recall_episodes
from microvlm.training.losses.fact_loss import DRAWING_WEIGHT, FactHeads, binary_loss, remember
from microvlm.training.recipe import Recipe, StageConfig

DISTRACTOR_SHARE = 0.2
"""Share of caption and scene rows that see a memory of something else."""
SCOPE_WEIGHT = 0.1
FACT_SCOPE_WEIGHT = 0.5
FACT_STRENGTH = 0.8
"""Of the views of a fact: turned by up to 20 degrees, on any ground."""
PATCH_WEIGHT, CLASSIFY_WEIGHT = 1.0, 0.3


class Batch(NamedTuple):
    """What a step is about, drawn before any of it is computed."""

    pixels: Tensor
    """float32 [N, 3, S, S]: captions, scenes, episodes, two views of each fact, crowds."""
    rows: np.ndarray
    """int64: the emoji of captions and episodes."""
    asked: list[tuple[Scene, Question]]
    facts: FactBatch | None
    crowd: Crowd
    """Without pixels."""
    rng: np.random.Generator
    """For what is drawn while the step is computed."""


class WithHeads(nn.Module):
    """The model with heads that only training needs: what each patch shows, which emoji the picture is, facts."""

    def __init__(self, model: MicroVLM, classes: int):
        super().__init__()
        self.model = model
        width = model.config.vision.hidden_size
        self.name_patch = nn.Linear(width, 1 + classes)
        self.classify = nn.Linear(width, classes)
        self.facts = FactHeads(model)


def name_tokens(processor: Processor) -> np.ndarray:
    """int64 [objects]: the first token of each object of a scene as a question has it, "where is the lion?": behind a
    blank, which the processor would take for the text's end.
    """
    words = [processor.tokenizer.encode(" " + caption)[0] for _, caption in read_scene_objects()]
    return np.array(words, np.int64)


class VLMTask:
    """Cross-entropy on answers, the scope detector's binary cross-entropy, and, while the vision encoder learns, the
    name of the object under each patch of a scene and of the emoji in a picture (of seen emoji alone)."""

    def __init__(self, model: MicroVLM, rows: TextRows, recipe: Recipe, stage: StageConfig, emoji: EmojiData):
        self.model, self.rows, self.stage, self.emoji = model, rows, stage, emoji
        self.config = model.config
        self.module = WithHeads(model, int(emoji.seen.sum()))
        self.label_of = np.full(len(emoji.hexcodes), IGNORED)
        self.label_of[np.flatnonzero(emoji.seen)] = np.arange(emoji.seen.sum())
        self.object_labels = self.label_of[[emoji.index(hexcode) for hexcode, _ in read_scene_objects()]]
        # Captions are learned for seen emoji alone.
        self.sampler = DrawingSampler(emoji, recipe.vendor_weights, seen_share=1.0)
        self.name_tokens = name_tokens(rows.processor)
        self.cross_entropy = answer_loss(stage.label_smoothing)
        counts = {kind: round(stage.batch_size * share) for kind, share in stage.mixture.items()}
        self.captions, self.scenes, self.episodes, self.crowds = (
            counts.get(k, 0) for k in ("caption", "scene", "episode", "crowd")
        )
        facts = counts.get("fact", 0)
        self.dealer = self._dealer(facts) if facts else None
        model.vision.requires_grad_(stage.vision_learning_rate > 0)

    def _dealer(self, facts: int) -> FactDealer:
        share, drawings = self.stage.drawing_share, None
        if share:
            others = load_drawings(self.emoji.folder)
            drawings = others.pixels[others.trained]
        return FactDealer(
            self.emoji, self.sampler, facts, FACT_STRENGTH, drawings=drawings, drawing_share=share
        )

    def parameter_groups(self) -> list[dict]:
        vision = [p for p in self.model.vision.parameters() if p.requires_grad]
        inside = {id(p) for p in self.model.vision.parameters()}
        rest = [p for p in self.module.parameters() if id(p) not in inside]
        groups = [{"params": rest, "lr": self.stage.learning_rate}]
        if vision:
            groups.append({"params": vision, "lr": self.stage.vision_learning_rate})
        return groups

    def draw(self, generator: torch.Generator) -> Batch:
        size = self.config.vision.image_size
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        drawn = self.sampler.rows(self.captions + 2 * self.episodes, generator)
        views = augment_emoji(
            self.sampler.pixels(drawn, self.sampler.vendors_of(drawn, generator)),
            generator,
            self.stage.augment_strength,
        )
        kinds = rng.choice(len(KINDS), self.scenes, p=[self.stage.scene_kinds[kind] for kind in KINDS])
        asked = [sample_question(rng, KINDS[kind]) for kind in kinds]
        scenes = compose_scenes([s for s, _ in asked], self.emoji, generator=generator, strength=1.0)
        strength = self.stage.augment_strength
        crowd = draw_crowd(self.sampler, self.label_of, self.crowds, size, strength, rng, generator)
        facts = self.dealer.deal(rng, generator) if self.dealer else None
        fact_views = [facts.views] if facts else []
        pixels = torch.cat(
            [views[: self.captions], scenes, views[self.captions :], *fact_views, crowd.pixels]
        )
        # The pixels travel once.
        none = pixels[:0]
        facts = facts._replace(views=none) if facts else None
        return Batch(pixels, drawn, asked, facts, crowd._replace(pixels=none), rng)

    def loss(self, helped: WithHeads, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        module = helped.model
        _, drawn, asked, facts, crowd, rng = batch
        pixels = batch.pixels.to(module.memory_prior.device, non_blocking=True)
        with torch.set_grad_enabled(self.stage.vision_learning_rate > 0):
            features = module.vision(normalise(pixels, self.config.vision))
        shown = self._shown(helped, features, drawn, [scene for scene, _ in asked], crowd)
        prefixes = module.adapter(features[: len(features) - self.crowds])
        split = self.captions + self.scenes
        end = split + 2 * self.episodes
        names = [self.emoji.captions[row] for row in drawn]
        direct = self._captions(names[: self.captions], rng) + [(q.text, q.answer) for _, q in asked]
        episode = recall_episodes(
            module, prefixes[split:end], names[self.captions :], self.rows, self.cross_entropy, rng
        )
        states, recalled = [episode.state], None
        if facts:
            recalled = remember(module, helped.facts, facts, prefixes[end:], self.rows, self.cross_entropy)
            states.append(recalled.state)
        with AttentionTap(module.decoder) if self.stage.guidance_weight else nullcontext() as tap:
            looked, scope_off = self._direct(module, prefixes[:split], direct, states, rng)
        scope = 0.5 * (episode.scope + scope_off)
        loss = looked + episode.loss * (self.episodes / max(1, split)) ** 0.5 + SCOPE_WEIGHT * scope
        metrics = {"answers": looked, "episodes": episode.loss, "scope": scope}
        if recalled:
            loss = loss + recalled.loss + FACT_SCOPE_WEIGHT * recalled.scope
            metrics |= recalled.metrics
        if self.stage.naming_weight:
            named = self._name_prefixes(
                module, prefixes[self.captions : split], [scene for scene, _ in asked]
            )
            loss = loss + self.stage.naming_weight * named
            metrics["named"] = named
        if tap is not None:
            guided = self._guide(tap, asked)
            loss = loss + self.stage.guidance_weight * guided
            metrics["guided"] = guided
        if shown is None:
            return loss, metrics
        if facts:
            leading, last = self.config.vision.num_leading_tokens, end + 2 * len(facts.shown)
            told_apart = helped.facts.drawings(features[end:last], leading, facts)
            loss = loss + DRAWING_WEIGHT * told_apart
            metrics["drawings"] = told_apart
        return loss + shown, metrics | {"shown": shown}

    def _name_prefixes(self, module: MicroVLM, prefixes: Tensor, scenes: list[Scene]) -> Tensor:
        """Cross-entropy of the tied head on the prefix embeddings that start over an object, against its name's token.

        A picture's place then holds what the text calls it, so that a question's word can find it by likeness.
        """
        leading = self.config.vision.num_leading_tokens
        grid = isqrt(self.config.prefix_tokens - leading)
        under = scene_labels(scenes, np.arange(len(self.name_tokens)), grid)
        image, cell = np.nonzero(under)
        wanted = torch.from_numpy(self.name_tokens[under[image, cell] - 1]).to(prefixes.device)
        over = prefixes[torch.from_numpy(image), torch.from_numpy(leading + cell)]
        logits = module.embedding.head(over)
        return F.cross_entropy(logits.float(), wanted)

    def _guide(self, tap: AttentionTap, asked: list[tuple[Scene, Question]]) -> Tensor:
        """The attention losses of the scene rows whose question names an object that is there."""
        device = next(self.module.parameters()).device
        word, answer = self._lookups(asked)
        loss = tap.loss(WORD_LAYER, word.to(device)) if len(word) else torch.zeros((), device=device)
        return loss + tap.loss(ANSWER_LAYER, answer.to(device)) if len(answer) else loss

    def _lookups(self, asked: list[tuple[Scene, Question]]) -> tuple[Lookups, Lookups]:
        """From each question's word to the prefix embeddings over its object, and, for `where`, from the position
        that chooses the answer to the word."""
        leading = self.config.vision.num_leading_tokens
        grid = isqrt(self.config.prefix_tokens - leading)
        under = scene_labels([scene for scene, _ in asked], np.arange(len(self.name_tokens)), grid)
        width = max(len(self.rows.prompt_ids(question.text, True)) for _, question in asked) if asked else 0
        words, answers = [], []
        for index, (scene, question) in enumerate(asked):
            ids = self.rows.prompt_ids(question.text, True)
            for placed in scene.objects:
                named = np.flatnonzero(np.array(ids) == self.name_tokens[placed.object])
                over = np.flatnonzero(under[index] == 1 + placed.object)
                if len(named) and len(over):
                    row, position = self.captions + index, int(named[-1])
                    words.append((row, position, leading + over))
                    if question.kind == "where":
                        answers.append((row, len(ids) - 1, named[-1:]))
        return Lookups.build(words, width), Lookups.build(answers, width)

    def _shown(
        self, helped: WithHeads, features: Tensor, drawn: np.ndarray, scenes: list[Scene], crowd: Crowd
    ) -> Tensor | None:
        """Cross-entropy of the two helping heads; None while the vision encoder is frozen."""
        if self.stage.vision_learning_rate == 0:
            return None
        leading = self.config.vision.num_leading_tokens
        side = self.config.vision.image_size // self.config.vision.patch_size
        split = self.captions + self.scenes
        end = split + 2 * self.episodes
        small = torch.cat([features[self.captions : split], features[len(features) - self.crowds :]])
        patches = helped.name_patch(small[:, leading:]).float()
        under = np.concatenate(
            [
                scene_labels(scenes, self.object_labels, side),
                patch_labels(crowd.labels, crowd.places, side),
            ]
        )
        named = F.cross_entropy(patches.flatten(0, 1), torch.from_numpy(under).to(features.device).flatten())
        whole = torch.cat([features[: self.captions, 0], features[split:end, 0]])
        labels = torch.from_numpy(self.label_of[drawn]).to(features.device)
        classified = F.cross_entropy(helped.classify(whole).float(), labels, label_smoothing=0.1)
        return PATCH_WEIGHT * named + CLASSIFY_WEIGHT * classified

    def _captions(self, names: list[str], rng: np.random.Generator) -> list[tuple[str, str]]:
        """Mostly the prompt that the command line uses, sometimes another way to ask."""
        other = rng.integers(1, len(CAPTION_PROMPTS), len(names)) * (rng.random(len(names)) < 0.2)
        return [(CAPTION_PROMPTS[k], name) for k, name in zip(other, names, strict=True)]

    def _direct(
        self,
        module: MicroVLM,
        prefixes: Tensor,
        samples: list[tuple[str, str]],
        states: list[MemoryState],
        rng: np.random.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Captions and scenes. The memory has nothing to say; some rows see it all the same and must ignore it.

        Those see the memories of `states`, of each kind as often.
        """
        embeds, mask, labels = self.rows.embedded(module, samples, prefixes)
        device = embeds.device
        count = max(1, round(len(samples) * DISTRACTOR_SHARE))
        rows = torch.from_numpy(rng.permutation(len(samples))[:count].copy()).to(device)
        drawn = [(state, _some(rng, len(state.mean), count).to(device)) for state in states]
        kept = torch.from_numpy(rng.permutation(len(states) * count)[:count].copy()).to(device)
        others = (torch.cat([s[n].detach()[some] for s, some in drawn])[kept] for n in range(2))
        # The query is the whole prompt, as at inference; its last token already has the answer's first as its label.
        query = mask[rows] * (labels[rows] != IGNORED).cumsum(1).le(1)
        code, key = module.memory_encode(embeds[rows].detach(), query)
        with full_precision(key.device.type):
            _, scope, _, slot = module.memory_read(key.float(), code.float(), *others)
        seen = torch.zeros(len(samples), dtype=torch.long, device=device).index_fill(0, rows, 1)
        full = [(_scatter(k, rows, len(samples)), _scatter(v, rows, len(samples))) for k, v in slot]
        return self.cross_entropy(module, embeds, mask, labels, full, seen), binary_loss(scope, 0.0)


def _some(rng: np.random.Generator, count: int, wanted: int) -> Tensor:
    """int64 [wanted]: rows of `count`, with repeats."""
    return torch.from_numpy(rng.integers(0, count, wanted))


def _scatter(part: Tensor, rows: Tensor, count: int) -> Tensor:
    """[r, heads, 1, D] at `rows` of a zero [count, heads, 1, D]."""
    return part.new_zeros(count, *part.shape[1:]).index_copy(0, rows, part)
