"""The DeiT vision encoder (Touvron et al. 2021, arXiv 2012.12877): pixels to patch features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.config import VisionConfig
from microvlm.model.attention import attend, merge_heads, split_heads
from microvlm.model.initial_values import normal
from microvlm.model.linear import LinearFactory


class VisionLayer(nn.Module):
    """A pre-norm transformer block with GELU: [B, T, width] -> the same shape."""

    def __init__(self, config: VisionConfig, linear: LinearFactory):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.query = linear(width, width, True)
        self.key = linear(width, width, True)
        self.value = linear(width, width, True)
        self.output = linear(width, width, True)
        self.norm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = linear(width, config.intermediate_size, True)
        self.fc2 = linear(config.intermediate_size, width, True)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_before(x)
        heads = [split_heads(layer(normed), self.heads) for layer in (self.query, self.key, self.value)]
        x = x + self.output(merge_heads(attend(heads[0], heads[1], heads[2], None)))
        return x + self.fc2(F.gelu(self.fc1(self.norm_after(x))))


class VisionEncoder(nn.Module):
    """Encodes normalised pixels float32 [B, 3, side, side] -> [B, leading + patches, width].

    The patch embedding is a linear layer over flattened patches (channel, row, column), so that it can be quantised
    like every other layer.
    """

    def __init__(self, config: VisionConfig, linear: LinearFactory):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.distillation_token:
            self.distillation_token = nn.Parameter(torch.zeros(1, 1, width))
        tokens = config.num_tokens
        self.position_embeddings = nn.Parameter(normal(1, tokens, width, std=0.02))
        self.patch_embedding = linear(3 * config.patch_size**2, width, True)
        self.layers = nn.ModuleList(VisionLayer(config, linear) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        size, side = self.config.patch_size, self.config.image_size // self.config.patch_size
        patches = pixel_values.reshape(-1, 3, side, size, side, size).permute(0, 2, 4, 1, 3, 5)
        x = self.patch_embedding(patches.reshape(-1, side * side, 3 * size * size))
        leading = [self.cls_token.expand(x.shape[0], -1, -1)]
        if self.config.distillation_token:
            leading.append(self.distillation_token.expand(x.shape[0], -1, -1))
        x = torch.cat([*leading, x], 1) + self.position_embeddings
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def normalise(pixels: Tensor, config: VisionConfig) -> Tensor:
    """Normalise pixels, float [B, 3, S, S] in 0..1, per channel: (x - mean) / std."""
    mean = pixels.new_tensor(config.image_mean).view(3, 1, 1)
    std = pixels.new_tensor(config.image_std).view(3, 1, 1)
    return (pixels - mean) / std
