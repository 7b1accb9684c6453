"""Stage `distill`: trains the vision encoder, a small DeiT, on a convolutional teacher's features and on emoji labels.

As in DeiT (arXiv 2012.12877, section 4) the class token predicts the label and the distillation token the teacher's
features. Only `seen` emoji have labels; every other emoji is an unlabelled picture with teacher features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.model.linear import linear_factory
from microvlm.model.vision import VisionEncoder, normalise
from microvlm.training.emoji.batches.drawing_sampler import DrawingSampler
from microvlm.training.emoji.data.views import augment_emoji
from microvlm.training.emoji.stages.emoji_task import EmojiTask
from microvlm.training.emoji.teacher import TEACHER_WIDTH, teacher_features
from microvlm.training.stages.task import StageInputs


class Student(nn.Module):
    """The vision encoder with DeiT's two heads: emoji classes and teacher features."""

    def __init__(self, config: MicroVLMConfig, classes: int):
        super().__init__()
        self.vision = VisionEncoder(config.vision, linear_factory(32))
        width = config.vision.hidden_size
        self.classify = nn.Linear(width, classes)
        self.distil = nn.Linear(width, TEACHER_WIDTH)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vision(pixels)
        return self.classify(tokens[:, 0]), self.distil(tokens[:, 1])


class DistillBatch(NamedTuple):
    """B drawings."""

    rows: np.ndarray
    """int64 [B]: the emoji."""
    vendors: np.ndarray
    """int64 [B], indices into the sampler's vendors."""
    pixels: Tensor
    """float32 [B, 3, S, S] in 0..1."""


class DistillTask(EmojiTask):
    """Cross-entropy on the labels of seen emoji, and cosine distance to the teacher's features of the same drawing and
    to the mean of its features over all drawings of the emoji.
    """

    def __init__(self, inputs: StageInputs):
        super().__init__(inputs)
        emoji = self.emoji
        self.sampler = DrawingSampler(emoji, self.recipe.vendor_weights)
        self.label_of = np.full(len(emoji.hexcodes), -100)
        self.label_of[np.flatnonzero(emoji.is_seen)] = np.arange(emoji.is_seen.sum())
        cached = teacher_features(emoji, self.sampler.vendors)
        stacked = torch.from_numpy(np.stack([cached[vendor] for vendor in self.sampler.vendors])).float()
        # Centred: pooled features after a ReLU all have about the same direction.
        drawn = stacked.abs().sum(-1, keepdim=True) > 0
        centre = stacked.sum((0, 1)) / drawn.sum()
        self.features = F.normalize((stacked - centre) * drawn, dim=-1)
        self.means = F.normalize(self.features.sum(0), dim=-1)
        self.module = Student(self.config, int(emoji.is_seen.sum()))

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.module.parameters()), "lr": self.stage.learning_rate}]

    def continue_from(self, tensors: dict[str, Tensor], source: str) -> None:
        raise UserError("a distill stage comes first in a recipe: it starts from nothing.")

    def draw(self, generator: torch.Generator) -> DistillBatch:
        rows = self.sampler.rows(self.stage.batch_size, generator)
        vendors = self.sampler.vendors_of(rows, generator)
        pixels = augment_emoji(self.sampler.pixels(rows, vendors), generator, self.stage.augment_strength)
        return DistillBatch(rows, vendors, pixels)

    def loss(self, module: nn.Module, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        rows, vendors, pixels = batch
        labels = torch.from_numpy(self.label_of[rows])
        device = next(module.parameters()).device
        logits, guess = module(normalise(pixels, self.config.vision).to(device))
        labels = labels.to(device)
        classify = F.cross_entropy(logits.float(), labels, label_smoothing=self.stage.label_smoothing)
        guess = F.normalize(guess.float(), dim=-1)
        own = self.features[torch.from_numpy(vendors), torch.from_numpy(rows)].to(device)
        mean = self.means[torch.from_numpy(rows)].to(device)
        distil = 2 - (guess * own).sum(-1).mean() - (guess * mean).sum(-1).mean()
        is_labelled = labels >= 0
        accuracy = (logits.argmax(-1) == labels)[is_labelled].float().mean()
        loss = classify + 2.0 * distil
        return loss, {"ce": classify, "distil": distil, "accuracy": accuracy}
