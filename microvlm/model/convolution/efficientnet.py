"""The convolutional vision encoder: EfficientNet-Lite in whole numbers, pixels to features of places.

Every convolution is integer arithmetic with a fixed scale a layer (Jacob et al. 2018, arXiv 1712.05877, section 2), so
that all backends have the same bytes behind every one. It is made from float weights
(`pretrained/efficientnet_weights.py`) and does not learn.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from microvlm.config import VisionConfig
from microvlm.formats.encoders.efficientnet_lite import (
    BYTE_ZERO,
    LINEAR_ZERO,
    RELU_ZERO,
    WINDOW,
    Block,
    Convolution,
    blocks,
    head,
    same_padding,
    stem,
)
from microvlm.model.convolution import integer_ops
from microvlm.model.linear import LinearFactory

POSTERIOR_SCALE = 6.0
"""Brings square roots of probabilities to the range of the features, ReLU6's 0 to 6."""
COLOUR_STEP = 1 / 8
"""What one step of a colour's byte adds: the colours of a token then have about the length of its features, and what
reads them learns as fast. A power of two, so that colours are exact."""


class IntegerConvolution(nn.Module):
    """uint8 [B, inputs, S, S] -> uint8 [B, outputs, T, T]. Weights are uint8 (q + 128), biases int32.

    y = clip(rint(float32(sum + bias) * (input_scale * weight_scale / output_scale)) + zero, 0, 255), rounded half to
    even, the bracket from left to right in float32: ONNX's QLinearConv as ONNX Runtime computes it.
    """

    def __init__(self, convolution: Convolution, size: int, input_zero: int):
        """`size` is S; `input_zero` the byte of the input that means 0."""
        super().__init__()
        self.stride, self.groups, self.input_zero = convolution.stride, convolution.groups, input_zero
        self.output_zero = LINEAR_ZERO if convolution.is_linear else RELU_ZERO
        before, after = same_padding(size, convolution.kernel, convolution.stride)
        self.pads = [before, before, after, after]
        self.register_buffer("weight", torch.zeros(convolution.weight_shape, dtype=torch.uint8))
        self.register_buffer("bias", torch.zeros(convolution.outputs, dtype=torch.int32))
        self.register_buffer("weight_scale", torch.ones(convolution.outputs))
        self.register_buffer("output_scale", torch.ones(()))
        self.traced = False

    weight: Tensor
    bias: Tensor
    weight_scale: Tensor
    output_scale: Tensor

    def forward(self, x: Tensor, input_scale: Tensor) -> Tensor:
        run = torch.ops.microvlm.integer_convolution if self.traced else integer_ops.integer_convolution_eager
        return run(
            x, input_scale, self.weight, self.weight_scale, self.output_scale, self.bias,
            self.input_zero, self.output_zero, self.pads, self.stride, self.groups,
        )  # fmt: skip


class InvertedResidual(nn.Module):
    """A block of the encoder: uint8 [B, inputs, S, S] -> uint8 [B, outputs, T, T]."""

    def __init__(self, block: Block, size: int, input_zero: int):
        super().__init__()
        self.has_shortcut = block.has_shortcut
        for convolution in block.convolutions:
            name = convolution.name.rpartition(".")[2]
            self.add_module(name, IntegerConvolution(convolution, size, input_zero))
            size, input_zero = -(-size // convolution.stride), RELU_ZERO
        self.traced = False

    def forward(self, x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
        y, scale = x, input_scale
        for child in self.children():
            layer = cast(IntegerConvolution, child)
            y, scale = layer(y, scale), layer.output_scale
        if self.has_shortcut:
            add = torch.ops.microvlm.integer_sum if self.traced else integer_ops.integer_sum_eager
            # The blocks of a stage share one scale, so that the sum of their bytes is the byte of their sum.
            y = add(x, y, scale)
        return y, scale


class EfficientNetLite(nn.Module):
    """Encodes normalised pixels float32 [B, 3, side, side] -> [B, 1 + windows, 4 x 1280 features + classes].

    With `colours` in its configuration, 4 x 3 numbers of colours stand between features and classes.

    A window is a square of 2 x 2 places of the last feature map; its token has the features of the four. The first
    token describes the whole picture by the mean features of its quarters. Behind the features stand square roots of
    class probabilities, times 6: of the whole picture by its mean features, of a window by the mean of its own features
    and those of the square around it, twice as wide, each with a classifier of its own.
    """

    def __init__(self, config: VisionConfig, linear: LinearFactory):
        super().__init__()
        self.config = config
        size = config.image_size
        self.stem = IntegerConvolution(stem(), size, BYTE_ZERO)
        size //= 2
        layers = []
        input_zero = RELU_ZERO
        for block in blocks(config.width_multiplier, config.depth_multiplier):
            layers.append(InvertedResidual(block, size, input_zero))
            input_zero = LINEAR_ZERO
            size //= max(convolution.stride for convolution in block.convolutions)
        self.blocks = nn.ModuleList(layers)
        self.head = IntegerConvolution(
            head(config.width_multiplier, config.depth_multiplier), size, LINEAR_ZERO
        )
        self.classifier = cast(nn.Linear, linear(config.hidden_size, config.num_classes, True))
        self.window_classifier = cast(nn.Linear, linear(config.hidden_size, config.num_classes, True))
        self.classifier.requires_grad_(False)
        self.window_classifier.requires_grad_(False)
        self.register_buffer("pixel_scale", torch.tensor(1 / 128))
        self.register_buffer("pooling", pooling_matrix(size))
        self.traced = False

    pixel_scale: Tensor
    pooling: Tensor

    def features(self, pixel_values: Tensor) -> Tensor:
        """The last feature map as bytes: float32 [B, 3, side, side] -> uint8 [B, F, side / 32, side / 32].

        F is 1280, or 1283 where the bytes of the mean colour of each place stand behind its features.
        """
        quantize = torch.ops.microvlm.pixel_bytes if self.traced else integer_ops.pixel_bytes_eager
        pixels = quantize(pixel_values, self.pixel_scale)
        x, scale = self.stem(pixels, self.pixel_scale), self.stem.output_scale
        for block in self.blocks:
            x, scale = block(x, scale)
        x = self.head(x, scale)
        return torch.cat([x, integer_ops.place_colours(pixels)], 1) if self.config.colours else x

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.tokens(self.features(pixel_values))

    def tokens(self, feature_bytes: Tensor) -> Tensor:
        """Tokens from the bytes of `features`. Means are of whole numbers over powers of two, exact in any order."""
        side = feature_bytes.shape[-1]
        places = feature_bytes.float()
        parts = torch.cat([self._squares(places, 2, side // 2), self._squares(places, side // WINDOW, 1)], 1)
        seen = self._scaled(parts)
        means = self.class_features(places)
        logits = torch.cat([self.classifier(means[:, :1]), self.window_classifier(means[:, 1:])], 1)
        posterior = logits.softmax(-1).sqrt() * POSTERIOR_SCALE
        return torch.cat([*(part.flatten(2) for part in seen), posterior], -1)

    def whole_token(self, quarters: Tensor) -> Tensor:
        """The first token alone, of mean bytes [B, 4, F] of the quarters of pictures: [B, 1, width of a token]."""
        seen = self._scaled(quarters[:, None])
        posterior = self.classifier(seen[0].mean(2)).softmax(-1).sqrt() * POSTERIOR_SCALE
        return torch.cat([*(part.flatten(2) for part in seen), posterior], -1)

    def class_features(self, places: Tensor) -> Tensor:
        """What classes are told by: maps [B, F, S, S] of whole numbers -> [B, 1 + windows, 1280], by `pooling_matrix`.

        Whole numbers times powers of two are summed, so the sums are exact in any order. Colours tell no class.
        """
        if self.config.colours:
            places = places[:, : self.config.hidden_size]
        return torch.matmul(places.flatten(2), self.pooling.T).mT * self.head.output_scale

    def _scaled(self, parts: Tensor) -> list[Tensor]:
        """Mean bytes of cells [B, n, 4, F] -> their features [B, n, 4, 1280], and their colours [B, n, 4, 3] if any."""
        if not self.config.colours:
            return [parts * self.head.output_scale]
        features, colours = parts[..., : self.config.hidden_size], parts[..., self.config.hidden_size :]
        return [features * self.head.output_scale, (colours - BYTE_ZERO) * COLOUR_STEP]

    @staticmethod
    def _squares(places: Tensor, count: int, size: int) -> Tensor:
        """Cut maps [B, F, S, S] into squares of 2 x 2 cells of `size` x `size` places: [B, squares, 4, F] of means.

        `count` cells lie on a side of the whole picture for `size` > 1, `count` squares otherwise.
        """
        squares = count // 2 if size > 1 else count
        cut = places.unflatten(3, (squares, 2, size)).unflatten(2, (squares, 2, size))
        # [B, F, rows, 2, size, columns, 2, size] -> rows, columns, 2, 2, F
        means = cut.mean((4, 7)) if size > 1 else cut[:, :, :, :, 0, :, :, 0]
        return means.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def pooling_matrix(side: int) -> Tensor:
    """The weights of a map's places in what classes are told by, float32 [1 + windows, side x side].

    The first row is the mean of all places. A window's is the mean of its 2 x 2 places and, with equal weight, of the
    4 x 4 around them; at an edge the larger square moves inwards.
    """
    places = torch.arange(side)
    around = min(2 * WINDOW, side)
    rows = []
    for window in range(side // WINDOW):
        first = WINDOW * window
        start = min(max(first - WINDOW // 2, 0), side - around)
        rows.append(
            [(places >= low) & (places < low + size) for low, size in ((first, WINDOW), (start, around))]
        )
    windows = [
        0.5 * torch.outer(y[0], x[0]) / WINDOW**2 + 0.5 * torch.outer(y[1], x[1]) / around**2
        for y in rows
        for x in rows
    ]
    return torch.stack([torch.full((side, side), 1 / side**2), *windows]).flatten(1).float()
