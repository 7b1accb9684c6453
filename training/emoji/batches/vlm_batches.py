"""Samples the batches of `vlm` stages: captions, scene questions, episodes, facts and emoji grids, and which of their
rows see an unrelated memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from microvlm.training.batches.episode_batches import EpisodeBatch, sample_episode_batch
from microvlm.training.batches.sample_texts import CAPTION_PROMPTS
from microvlm.training.emoji.batches.drawing_sampler import DrawingSampler
from microvlm.training.emoji.batches.emoji_grids import EmojiGrids, sample_emoji_grids
from microvlm.training.emoji.batches.fact_batches import FactBatch, FactSampler
from microvlm.training.emoji.data.drawings import load_drawings
from microvlm.training.emoji.data.emoji import EmojiData
from microvlm.training.emoji.data.scene_drawing import compose_scenes
from microvlm.training.emoji.data.scenes import KINDS, Question, Scene, sample_question
from microvlm.training.emoji.data.views import augment_emoji
from microvlm.training.recipe import Recipe, StageConfig

DISTRACTOR_SHARE = 0.2
"""Share of the caption and scene rows that see an unrelated memory."""
OTHER_PROMPT_SHARE = 0.2
"""Share of the captions that are asked for in other words than the command line's."""
FACT_STRENGTH = 0.8
"""Augmentation of the views of facts: turned by up to 20 degrees, on any ground."""

SAMPLE_KINDS = ("caption", "scene", "episode", "fact", "crowd")
"""Kinds of a `mixture`, in the order of the fields of BatchCounts."""


class BatchCounts(NamedTuple):
    """Samples of each kind in a batch. Pictures stand in this order: captions, scenes, episodes, facts, grids."""

    captions: int
    scenes: int
    episodes: int
    """Half the number of images that episodes are made of."""
    facts: int
    grids: int

    @property
    def direct(self) -> int:
        """Captions and scenes: the rows that need no memory."""
        return self.captions + self.scenes

    @property
    def episode_end(self) -> int:
        """Index at which the pictures of the facts start."""
        return self.direct + 2 * self.episodes

    @classmethod
    def of(cls, stage: StageConfig) -> BatchCounts:
        return cls(*map(stage.count_of, SAMPLE_KINDS))


class Distractors(NamedTuple):
    """Rows that see a memory which has nothing to say about them, and which memories those are."""

    rows: np.ndarray
    """int64 [d], caption and scene rows."""
    memories: list[np.ndarray]
    """int64 [d] for each kind of memory (of episodes, of facts): candidates, indices of that kind's memories."""
    chosen: np.ndarray
    """int64 [d]: which of the concatenated candidates each row sees."""


class VLMBatch(NamedTuple):
    """One batch of a `vlm` stage."""

    pixels: Tensor
    """float32 [N, 3, S, S]: captions, scenes, episodes, two views of each fact, emoji grids."""
    rows: np.ndarray
    """int64: the emoji of captions and episodes."""
    scene_questions: list[tuple[Scene, Question]]
    samples: list[tuple[str, str]]
    """(prompt, answer) of captions and scenes."""
    episodes: EpisodeBatch
    distractors: Distractors
    facts: FactBatch | None
    """Without views."""
    grids: EmojiGrids
    """Without pixels."""


class VLMBatchSampler:
    """Samples the batches of one `vlm` stage. `label_of`: the class of every emoji row, for the grids' labels."""

    def __init__(
        self, emoji: EmojiData, recipe: Recipe, stage: StageConfig, label_of: np.ndarray, image_size: int
    ):
        self.emoji, self.stage, self.label_of, self.image_size = emoji, stage, label_of, image_size
        self.counts = BatchCounts.of(stage)
        # Only the captions of seen emoji may be trained on.
        self.drawings = DrawingSampler(emoji, recipe.vendor_weights, seen_share=1.0)
        self.facts = self._fact_sampler() if self.counts.facts else None

    def _fact_sampler(self) -> FactSampler:
        share, drawings = self.stage.drawing_share, None
        if share:
            others = load_drawings(self.emoji.folder)
            drawings = others.pixels[others.trained]
        return FactSampler(
            self.emoji,
            self.drawings,
            self.counts.facts,
            FACT_STRENGTH,
            drawings=drawings,
            drawing_share=share,
        )

    def sample(self, generator: torch.Generator) -> VLMBatch:
        counts, strength = self.counts, self.stage.augment_strength
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        rows = self.drawings.rows(counts.captions + 2 * counts.episodes, generator)
        views = augment_emoji(
            self.drawings.pixels(rows, self.drawings.vendors_of(rows, generator)), generator, strength
        )
        kinds = rng.choice(len(KINDS), counts.scenes, p=[self.stage.scene_kinds[kind] for kind in KINDS])
        scene_questions = [sample_question(rng, KINDS[kind]) for kind in kinds]
        scenes = compose_scenes(
            [scene for scene, _ in scene_questions], self.emoji, generator=generator, strength=1.0
        )
        grids = sample_emoji_grids(
            self.drawings, self.label_of, counts.grids, self.image_size, strength, rng, generator
        )
        facts = self.facts.sample(rng, generator) if self.facts else None
        fact_views = [facts.views] if facts else []
        pixels = torch.cat(
            [views[: counts.captions], scenes, views[counts.captions :], *fact_views, grids.pixels]
        )
        # The order of the following draws is part of the recipes' reproducibility.
        captions = [self.emoji.captions[row] for row in rows[: counts.captions]]
        samples = _caption_samples(captions, rng) + [(q.text, q.answer) for _, q in scene_questions]
        episodes = sample_episode_batch(rng, 2 * counts.episodes)
        memories = [2 * counts.episodes, *([int(facts.group.max()) + 1] if facts else [])]
        distractors = _sample_distractors(rng, len(samples), memories)
        # Every picture is in `pixels` alone: workers send each batch to the trainer.
        empty = pixels[:0]
        return VLMBatch(
            pixels,
            rows,
            scene_questions,
            samples,
            episodes,
            distractors,
            facts._replace(views=empty) if facts else None,
            grids._replace(pixels=empty),
        )


def _caption_samples(captions: list[str], rng: np.random.Generator) -> list[tuple[str, str]]:
    """(prompt, caption): mostly the prompt of the command line, sometimes another wording."""
    other = rng.integers(1, len(CAPTION_PROMPTS), len(captions)) * (
        rng.random(len(captions)) < OTHER_PROMPT_SHARE
    )
    return [(CAPTION_PROMPTS[k], caption) for k, caption in zip(other, captions, strict=True)]


def _sample_distractors(rng: np.random.Generator, samples: int, memories: list[int]) -> Distractors:
    """`memories`: how many memories of each kind there are; each kind is seen equally often."""
    count = max(1, round(samples * DISTRACTOR_SHARE))
    rows = rng.permutation(samples)[:count].copy()
    candidates = [rng.integers(0, number, count) for number in memories]
    chosen = rng.permutation(len(memories) * count)[:count].copy()
    return Distractors(rows, candidates, chosen)
