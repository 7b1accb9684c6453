"""Attention functions of the vision encoder, the decoder and the memory encoder, without weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split the last axis into heads: [B, S, heads * D] -> [B, heads, S, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Join the heads: [B, heads, S, D] -> [B, S, heads * D]."""
    return x.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention with grouped key/value heads.

    query [B, heads, S, D], key and value [B, kv_heads, T, D] -> [B, heads, S, D]. `mask` broadcasts to
    [B, heads, S, T]: bool, true where a query may attend, or float, added to the scores. Every row must allow at least
    one key.
    """
    groups = query.shape[1] // key.shape[1]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
        if not torch.is_grad_enabled():
            # A bias that requires gradients would select another kernel, with other last bits.
            mask = mask.detach()
    if query.requires_grad and query.device.type == "cpu":
        # On a CPU torch's fused backward takes half of a training step, two plain products a tenth of that.
        key, value = repeat_heads(key, groups), repeat_heads(value, groups)
        return _softmax(query, key, mask).to(value.dtype) @ value
    if groups > 1 and query.is_cuda:
        # The memory-efficient CUDA kernel takes a mask or grouped heads, not both.
        key, value, groups = repeat_heads(key, groups), repeat_heads(value, groups), 1
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=groups > 1)


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """The weights softmax(QK' / sqrt(D)) that `attend` gives the values, [B, heads, S, T]."""
    return _softmax(query, repeat_heads(key, query.shape[1] // key.shape[1]), mask)


def _softmax(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    scores = (query / query.shape[-1] ** 0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """Repeat KV heads for grouped queries: [B, kv_heads, T, D] -> [B, kv_heads * groups, T, D]."""
    return x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [B, 1, S, D] each, of positions int64 [B, S] (Su et al. 2021, arXiv 2104.09864).

    The halves of a head are rotated against each other (half-split order).
    """
    # Computed with Python floats, because runtimes round a float32 power differently.
    frequencies = torch.tensor(
        [theta ** (-i / head_dim) for i in range(0, head_dim, 2)], device=position_ids.device
    )
    angles = position_ids.float().unsqueeze(-1) * frequencies
    angles = torch.cat([angles, angles], -1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to [B, heads, S, D]."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin
