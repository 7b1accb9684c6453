"""Alignment: a symmetric contrastive loss that brings the features of a picture and of its caption together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.training.batches.sample_texts import IGNORED

FEATURES = 256
MAX_SCALE = 100.0


class AlignmentHeads(nn.Module):
    """Heads that exist in training only: pooled prefix embeddings and pooled caption tokens to features.

    The scale of the cosines is learnt, from 1 / .07, and held at 100 at most (Radford et al. 2021, arXiv 2103.00020).
    """

    def __init__(self, width: int):
        super().__init__()
        self.image = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, FEATURES))
        self.text = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, FEATURES))
        # One element and not a scalar, which FSDP2 cannot split.
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def features(self, prefixes: Tensor, embeds: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features [B, 256] of prefixes [B, k, H], and of the answers' tokens in embeddings [B, S, H].

        labels : int64 [B, S] of the rows. The tokens of an answer are the positions after the first labelled one.
        """
        is_labelled = labels != IGNORED
        after = is_labelled.roll(1, 1)
        after[:, 0] = False
        weights = (is_labelled & after).float()
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        pooled = torch.einsum("bs,bsh->bh", weights, embeds.float())
        image = F.normalize(self.image(prefixes.float().mean(1)), dim=-1)
        return image, F.normalize(self.text(pooled), dim=-1)

    def scale(self) -> Tensor:
        return self.log_scale.clamp(max=math.log(MAX_SCALE)).exp()


def alignment_loss(image: Tensor, text: Tensor, scale: Tensor, captions: Sequence[str]) -> Tensor:
    """Symmetric cross-entropy of the right partner among B features [B, 256]; chance is ln B.

    Pictures with the same caption are no negatives of each other.
    """
    scores = scale * image @ text.T
    words = np.asarray(captions)
    same = torch.from_numpy((words[:, None] == words) & ~np.eye(len(words), dtype=bool)).to(scores.device)
    scores = scores.masked_fill(same, float("-inf"))
    partner = torch.arange(len(words), device=scores.device)
    return 0.5 * (F.cross_entropy(scores, partner) + F.cross_entropy(scores.T, partner))


def chance_loss(captions: Sequence[str]) -> float:
    """The alignment loss of features that say nothing, nats: ln B for B different captions, less for equal ones."""
    words = np.asarray(captions)
    same = (words[:, None] == words).sum(1)
    return float(np.log(len(words) - same + 1).mean())


def chance_recall(captions: Sequence[str]) -> float:
    """R@1 of features that say nothing: the mean share of captions with a picture's own words."""
    words = np.asarray(captions)
    return float((words[:, None] == words).mean())


def recall_at_one(image: Tensor, text: Tensor, captions: Sequence[str]) -> float:
    """Share of pictures [n, 256] whose nearest caption [n, 256] is theirs, or has the same words."""
    nearest = (image @ text.T).argmax(1).tolist()
    return sum(captions[row] == captions[other] for row, other in enumerate(nearest)) / max(1, len(captions))
