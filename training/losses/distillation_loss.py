"""Distillation of a float decoder into a ternary one: next-token distributions and attention relations.

BitDistill (arXiv 2510.13998): KL(teacher || student) at a temperature, and relations of queries, keys and values of one
layer as MiniLMv2 compares them (arXiv 2012.15828).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from microvlm.model.attention import merge_heads
from microvlm.model.decoder import Decoder, DecoderLayer, SelfAttention

Heads = tuple[Tensor, Tensor, Tensor]


def logits_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over rows of KL(teacher || student) tau^2, of logits [n, V] -> scalar, nats."""
    target = F.log_softmax(teacher.float() / temperature, -1)
    guess = F.log_softmax(student.float() / temperature, -1)
    return F.kl_div(guess, target, reduction="batchmean", log_target=True) * temperature**2


def relation_divergence(student: Heads, teacher: Heads, mask: Tensor, groups: int) -> Tensor:
    """Mean KL(teacher || student) of the relations softmax(A A') of Q, K and V, [B, heads, S, D] each -> scalar, nats.

    A is each of the three, split anew into `groups` (or fewer, where these do not divide its width) and normalised to
    unit rows. mask : int64 [B, S]; padding is neither row nor column.
    """
    total = student[0].new_zeros((), dtype=torch.float32)
    for own, other in zip(student, teacher, strict=True):
        guess, target = (_relations(part, mask, groups) for part in (own, other))
        divergence = (
            (target.exp() * (target - guess)).masked_fill(~mask.bool()[:, None, None, :], 0.0).sum(-1)
        )
        real = mask.bool()[:, None, :].expand_as(divergence)
        total = total + divergence[real].mean()
    return total / 3


def _relations(part: Tensor, mask: Tensor, groups: int) -> Tensor:
    """Log relations [B, groups, S, S] of heads [B, heads, S, D]."""
    flat = merge_heads(part).float()
    count = gcd(groups, flat.shape[-1])
    split = F.normalize(flat.unflatten(-1, (count, -1)).transpose(1, 2), dim=-1)
    scores = split @ split.mT
    # A finite number: a padded row would otherwise be all minus infinity, whose gradient is NaN.
    return F.log_softmax(scores.masked_fill(~mask.bool()[:, None, None, :], -1e4), -1)


@contextmanager
def recorded_heads(decoder: Decoder, layer: int) -> Iterator[list[Heads]]:
    """Within, every forward pass appends Q, K and V [B, heads, S, D] of one layer to the list."""
    attention = cast(SelfAttention, cast(DecoderLayer, decoder.layers[layer]).self_attn)
    recorded: list[Heads] = []
    original = attention.heads

    def heads(*args: Any) -> Heads:
        result = original(*args)
        recorded.append(result)
        return result

    attention.heads = heads  # type: ignore[assignment, method-assign]
    try:
        yield recorded
    finally:
        del attention.heads
