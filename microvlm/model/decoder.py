"""A Qwen2 or Llama causal decoder with an explicit KV cache, whose position 0 is the memory slot.

Parameters have Hugging Face's names, so that loading a checkpoint only removes a prefix from its keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.config import TextConfig
from microvlm.model import torch_ops
from microvlm.model.attention import (
    attend,
    attention_weights,
    merge_heads,
    rotary_tables,
    rotate,
    split_heads,
)
from microvlm.model.linear import LinearFactory

Cache = list[tuple[Tensor, Tensor]]
"""Key and value per layer, float32 [B, kv_heads, P, D]. Position 0 is the memory slot."""


class RMSNorm(nn.Module):
    """RMS normalisation of the last axis (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # The statistics stay float32 where autocast made x bfloat16.
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


class SelfAttention(nn.Module):
    """Causal self-attention with grouped KV heads and rotary positions."""

    def __init__(self, config: TextConfig, linear: LinearFactory):
        super().__init__()
        self.config = config
        query_width = config.num_attention_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, query_width, config.attention_bias)
        self.k_proj = linear(config.hidden_size, config.kv_width, config.attention_bias)
        self.v_proj = linear(config.hidden_size, config.kv_width, config.attention_bias)
        self.o_proj = linear(query_width, config.hidden_size, False)
        self.sub_norm = RMSNorm(query_width, config.rms_norm_eps) if config.sub_norm else nn.Identity()

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project [B, S, H] -> rotated query and key heads, and value heads, [B, heads, S, D] each."""
        query = split_heads(self.q_proj(x), self.config.num_attention_heads)
        key = split_heads(self.k_proj(x), self.config.num_key_value_heads)
        value = split_heads(self.v_proj(x), self.config.num_key_value_heads)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        query, key, value = self.heads(x, cos, sin)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        mixed = merge_heads(attend(query, key, value, mask))
        return self.o_proj(self.sub_norm(mixed)), (key, value)


class MLP(nn.Module):
    """The feed-forward part of a layer (SwiGLU): [B, S, H] -> the same shape."""

    def __init__(self, config: TextConfig, linear: LinearFactory):
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size, False)
        self.up_proj = linear(config.hidden_size, config.intermediate_size, False)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, False)
        self.sub_norm = (
            RMSNorm(config.intermediate_size, config.rms_norm_eps) if config.sub_norm else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.sub_norm(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class DecoderLayer(nn.Module):
    """A pre-norm layer: attention, then MLP. Returns its output and its key and value."""

    def __init__(self, config: TextConfig, linear: LinearFactory):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, linear)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, linear)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mixed, present = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), present


def decoder_mask(attention_mask: Tensor, queries: int) -> Tensor:
    """Causal attention mask: int64 [B, P + S], 1 where a key is visible -> bool [B, 1, S, P + S].

    A token always sees itself. Otherwise the padding of a row would see nothing and become NaN, and a NaN key spoils
    even the rows that mask it.
    """
    total = attention_mask.shape[1]
    keys = torch.arange(total, device=attention_mask.device)
    own = torch.arange(queries, device=attention_mask.device).unsqueeze(1) + (total - queries)
    visible = attention_mask.bool()[:, None, None, :] & (keys <= own)
    return visible | (keys == own)


@torch.library.custom_op("microvlm::decoder_mask", mutates_args=())
def traced_mask(attention_mask: Tensor, position_ids: Tensor) -> Tensor:
    """`decoder_mask` of as many queries as `position_ids` [B, S] has; one node in a trace."""
    return decoder_mask(attention_mask, position_ids.shape[1])


@traced_mask.register_fake
def _fake_traced_mask(attention_mask: Tensor, position_ids: Tensor) -> Tensor:
    batch, total = attention_mask.shape
    return attention_mask.new_empty((batch, 1, position_ids.shape[1], total), dtype=torch.bool)


class Decoder(nn.Module):
    """Decoder layers and final norm: embeddings [B, S, H] and a cache of P positions -> (hidden [B, S, H], cache)."""

    def __init__(self, config: TextConfig, linear: LinearFactory):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config, linear) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Cache,
        num_logits_to_keep: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        """attention_mask is int64 [B, P + S], position_ids [B, S].

        With `num_logits_to_keep` (int64 scalar n >= 1) only the last n hidden states are returned.
        """
        cos, sin = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta)
        if num_logits_to_keep is None:
            mask = decoder_mask(attention_mask, inputs_embeds.shape[1])
        else:
            mask = traced_mask(attention_mask, position_ids)
        x, presents = self._rotate(inputs_embeds), []
        for layer, layer_past in zip(self.layers, past, strict=True):
            x, present = layer(x, cos, sin, mask, layer_past)
            presents.append(present)
        if num_logits_to_keep is not None:
            x = torch_ops.keep_last(x, num_logits_to_keep)
        return self.norm(self._rotate(x)), presents

    def _rotate(self, x: Tensor) -> Tensor:
        """Into the layers' basis, and out of it: the matrix is its own inverse."""
        return torch_ops.rotate_blocks(x, self.config.rotation) if self.config.rotation else x

    def key_biases(self) -> list[Tensor | None]:
        """The bias of each layer's k_proj, [kv_heads * D], or None where there is none."""
        layers = cast(Iterable[DecoderLayer], self.layers)
        return [cast(Tensor | None, layer.self_attn.k_proj.bias) for layer in layers]

    @torch.no_grad()
    def attention_maps(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Cache
    ) -> list[Tensor]:
        """Attention weights of every layer, [B, heads, S, P + S] each."""
        cos, sin = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta)
        mask = decoder_mask(attention_mask, inputs_embeds.shape[1])
        x, maps = self._rotate(inputs_embeds), []
        layers = cast(Iterable[DecoderLayer], self.layers)
        for layer, layer_past in zip(layers, past, strict=True):
            query, key, _ = layer.self_attn.heads(layer.input_layernorm(x), cos, sin)
            maps.append(attention_weights(query, torch.cat([layer_past[0], key], 2), mask))
            x, _ = layer(x, cos, sin, mask, layer_past)
        return maps
