"""Elementary loss functions: answer cross-entropy, binary cross-entropy, InfoNCE and the frame potential."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from microvlm.model.decoder import Cache
from microvlm.model.microvlm import MicroVLM
from microvlm.training.batches.sample_texts import IGNORED

TEMPERATURE = 0.07

AnswerLoss = Callable[[MicroVLM, Tensor, Tensor, Tensor, Cache, Tensor | None], Tensor]
"""(model, embeddings [B, S, H], mask [B, S], labels [B, S], memory slot, rows that see the slot) -> loss."""


def answer_loss(label_smoothing: float) -> AnswerLoss:
    """Return the mean cross-entropy of a batch's answer tokens as a function.

    Its last two arguments are the memory slot of every row [B] and which rows see it, int64 [B] of 0 and 1; None lets
    all rows see it.
    """

    def cross_entropy(
        module: MicroVLM,
        embeds: Tensor,
        mask: Tensor,
        labels: Tensor,
        slot: Cache,
        slot_visible: Tensor | None,
    ) -> Tensor:
        labelled = labels != IGNORED
        logits = module(embeds, mask, slot, slot_visible, labelled)
        return F.cross_entropy(logits.float(), labels[labelled], label_smoothing=label_smoothing)

    return cross_entropy


def binary_loss(probability: Tensor, target: float) -> Tensor:
    """Mean cross-entropy of probabilities [n] against one target, 0 or 1; 0 for an empty tensor."""
    if not len(probability):
        return probability.new_zeros(())
    probability = probability.float().clamp(1e-6, 1 - 1e-6)
    return -(probability.log() if target else (1 - probability).log()).mean()


def info_nce(queries: Tensor, keys: Tensor, same: np.ndarray) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) of paired rows [F, W].

    same : bool [F, F]; pairs that are equal and therefore no negatives of each other.
    """
    scores = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T / TEMPERATURE
    not_negative = torch.from_numpy(same & ~np.eye(len(same), dtype=bool)).to(scores.device)
    scores = scores.masked_fill(not_negative, float("-inf"))
    partner = torch.arange(len(same), device=scores.device)
    return 0.5 * (F.cross_entropy(scores, partner) + F.cross_entropy(scores.T, partner))


def frame_potential(rows: Tensor) -> Tensor:
    """Mean squared cosine between different rows of [F, W] (Benedetto & Fickus 2003); 1 / W for evenly spread rows."""
    cosines = F.normalize(rows, dim=-1) @ F.normalize(rows, dim=-1).T
    count = len(rows)
    return (cosines.square().sum() - count) / (count * (count - 1))
