"""The adapter: maps patch features to the k prefix embeddings that the decoder reads."""

from __future__ import annotations

from math import isqrt
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.config import MicroVLMConfig
from microvlm.model.attention import attend, attention_weights, merge_heads, split_heads
from microvlm.model.initial_values import computed, normal
from microvlm.model.linear import LinearFactory

REGION_BIAS = 5.0
PLACE_SCALE = 1.0


def regional_bias(config: MicroVLMConfig) -> Tensor:
    """Initial pooling bias, float32 [k, tokens], that gives each query a region of the image.

    The first queries get the class (and distillation) token, the next the cells of the largest square grid that they
    fill, in reading order; the remaining ones get no region.
    """
    side = config.vision.image_size // config.vision.patch_size
    leading = min(config.vision.num_leading_tokens, config.prefix_tokens)
    bias = torch.zeros(config.prefix_tokens, config.vision.num_leading_tokens + side * side)
    bias[range(leading), range(leading)] = REGION_BIAS
    grid = min(isqrt(config.prefix_tokens - leading), side)
    cell = torch.arange(side) * grid // side if grid else torch.zeros(side, dtype=torch.long)
    region = (cell[:, None] * grid + cell).flatten()
    for query in range(grid * grid):
        bias[leading + query, config.vision.num_leading_tokens :][region == query] = REGION_BIAS
    return bias


class Adapter(nn.Module):
    """Learned queries attend over vision tokens: [B, tokens, vision width] -> [B, k, decoder width].

    A learned bias on the scores starts every query at its own region; without it, the model needs many more steps to
    learn which object is where. A learned embedding per query is added to the output, because rotary attention tells
    the decoder how far a word is from a prefix embedding, not where in the image that embedding lies.
    """

    def __init__(self, config: MicroVLMConfig, linear: LinearFactory):
        super().__init__()
        wide, narrow = config.text.hidden_size, config.vision.hidden_size
        self.heads = config.vision.num_attention_heads
        self.queries = nn.Parameter(normal(1, config.prefix_tokens, narrow, std=0.02))
        tokens = config.vision.num_tokens
        self.pooling_bias = nn.Parameter(
            computed(config.prefix_tokens, tokens, values=lambda: regional_bias(config))
        )
        self.norm_in = nn.LayerNorm(narrow)
        self.query = linear(narrow, narrow, True)
        self.key = linear(narrow, narrow, True)
        self.value = linear(narrow, narrow, True)
        self.projection = linear(narrow, wide, True)
        self.norm_mlp = nn.LayerNorm(wide)
        self.fc1 = linear(wide, 2 * wide, True)
        self.fc2 = linear(2 * wide, wide, True)
        self.norm_out = nn.LayerNorm(wide)
        self.places = nn.Parameter(normal(1, config.prefix_tokens, wide, std=PLACE_SCALE))

    def _heads(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.norm_in(features)
        queries = self.query(self.queries).expand(features.shape[0], -1, -1)
        return (
            split_heads(queries, self.heads),
            split_heads(self.key(features), self.heads),
            split_heads(self.value(features), self.heads),
        )

    def forward(self, features: Tensor) -> Tensor:
        query, key, value = self._heads(features)
        x = self.projection(merge_heads(attend(query, key, value, self.pooling_bias)))
        x = x + self.fc2(F.gelu(self.fc1(self.norm_mlp(x))))
        return self.norm_out(x) + self.places

    def pooling_weights(self, features: Tensor) -> Tensor:
        """Weight of each vision token in each prefix embedding, averaged over heads -> [B, k, tokens]."""
        query, key, _ = self._heads(features)
        return attention_weights(query, key, self.pooling_bias).mean(1)


class GridAdapter(nn.Module):
    """Every token of a convolutional encoder becomes a prefix embedding: [B, n, 4 x features + classes] -> [B, n, H].

    The token of the whole picture and those of windows have a projection each, and so have class probabilities.
    Colours, where the encoder gives some between features and classes, have two of their own: a dozen numbers beside
    thousands of features need other scales of eight bits. They begin at zero: a model that gets them computes what it
    did before.
    A learned embedding of the place is added, as in `Adapter`. The first tokens alone give the first embeddings.

    Behind them stand `name_pieces` embeddings that spell the name of the whole picture's class: of each piece, the mean
    over classes of that token's embedding, weighted by fourth powers of probabilities. The decoder copies them, so that
    it says names that it was never trained on (pointer networks: Vinyals et al. 2015, arXiv 1506.03134).
    """

    def __init__(self, config: MicroVLMConfig, linear: LinearFactory):
        super().__init__()
        wide, vision = config.text.hidden_size, config.vision
        self.features, self.pieces = vision.features_of_token, vision.name_pieces
        self.whole = linear(self.features, wide, True)
        self.projection = linear(self.features, wide, True)
        self.colours = vision.colours_of_token
        if self.colours:
            self.whole_colours = linear(self.colours, wide, False)
            self.window_colours = linear(self.colours, wide, False)
            for layer in (self.whole_colours, self.window_colours):
                nn.init.zeros_(cast(nn.Linear, layer).weight)
        self.classes = linear(vision.num_classes, wide, False)
        if self.pieces:
            self.names = linear(vision.num_classes, self.pieces * wide, False)
        self.norm_mlp = nn.LayerNorm(wide)
        self.fc1 = linear(wide, 2 * wide, True)
        self.fc2 = linear(2 * wide, wide, True)
        self.norm_out = nn.LayerNorm(wide)
        self.places = nn.Parameter(normal(1, vision.num_tokens, wide, std=PLACE_SCALE))

    def forward(self, features: Tensor, table: Tensor | None = None) -> Tensor:
        """`table`: embeddings [classes, pieces, H] of the names' tokens in place of the stored ones, in training."""
        behind = self.features + self.colours
        seen, posterior = features[..., : self.features], features[..., behind:]
        x = torch.cat([self.whole(seen[:, :1]), self.projection(seen[:, 1:])], 1) + self.classes(posterior)
        if self.colours:
            colours = features[..., self.features : behind]
            x = x + torch.cat([self.whole_colours(colours[:, :1]), self.window_colours(colours[:, 1:])], 1)
        x = x + self.fc2(F.gelu(self.fc1(self.norm_mlp(x))))
        prefix = self.norm_out(x) + self.places[:, : features.shape[1]]
        if not self.pieces:
            return prefix
        # The posterior holds square roots of probabilities.
        weights = posterior[:, :1].square().square().square()
        weights = weights / weights.sum(-1, keepdim=True)
        spelled = self.names(weights) if table is None else weights @ table.flatten(1)
        return torch.cat([prefix, spelled.unflatten(-1, (self.pieces, -1)).flatten(1, 2)], 1)

    def pooling_weights(self, features: Tensor) -> Tensor:
        """Weight of each token in each prefix embedding -> [B, k, n]: it is made of its own, and names of the first."""
        tokens = features.shape[1]
        own = torch.eye(tokens, device=features.device)
        return torch.cat([own, own[:1].expand(self.pieces, -1)]).expand(features.shape[0], -1, -1)
