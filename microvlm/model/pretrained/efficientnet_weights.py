"""Turn EfficientNet-Lite's float weights into the whole numbers of `convolution.efficientnet`.

Batch normalization is folded into the convolution before it. Scales of weights are one an output channel; scales of
activations are one a layer, from pictures that the encoder is calibrated on (Krishnamoorthi 2018, arXiv 1806.08342,
sections 3.1 and 3.2). Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from microvlm.config import VisionConfig
from microvlm.errors import UserError
from microvlm.formats.encoders.efficientnet_lite import (
    STRIDE,
    Convolution,
    blocks,
    convolutions,
    same_padding,
)
from microvlm.model.convolution.efficientnet import pooling_matrix
from microvlm.model.convolution.integer_ops import WEIGHT_ZERO

CLASSIFIERS = ("classifier", "window_classifier")
EPSILON = 1e-3
"""Of batch normalization, in all Lite models."""
PIXEL_SCALE = 1 / 128
HIGHEST = 6.0
"""Of a ReLU6."""
TAIL = 1e-4
"""Share of a linear layer's activations that may lie outside of its bytes."""
_BLOCK_NAMES = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}


@dataclass
class FloatConvolution:
    """A convolution with its batch normalization folded in."""

    sizes: Convolution
    weight: Tensor
    """float32 [outputs, inputs of a group, kernel, kernel]."""
    bias: Tensor
    """float32 [outputs]."""

    def __call__(self, x: Tensor) -> Tensor:
        before, after = same_padding(x.shape[-1], self.sizes.kernel, self.sizes.stride)
        padded = F.pad(x, (before, after, before, after))
        y = F.conv2d(padded, self.weight, self.bias, self.sizes.stride, 0, 1, self.sizes.groups)
        return y if self.sizes.is_linear else y.clamp(0, HIGHEST)


def fold(state: Mapping[str, Tensor], config: VisionConfig, origin: object) -> dict[str, FloatConvolution]:
    """The encoder's convolutions by name, from a state dict with the names of the package efficientnet-lite-pytorch.

    Raises UserError for a tensor that is missing or of another shape.
    """
    result = {}
    for sizes in convolutions(config.width_multiplier, config.depth_multiplier):
        convolution, norm = package_names(sizes.name)
        weight = _tensor(state, f"{convolution}.weight", sizes.weight_shape, origin)
        gamma, beta, mean, variance = (
            _tensor(state, f"{norm}.{leaf}", (sizes.outputs,), origin)
            for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        factor = gamma / torch.sqrt(variance + EPSILON)
        result[sizes.name] = FloatConvolution(
            sizes, weight * factor[:, None, None, None], beta - mean * factor
        )
    return result


@torch.no_grad()
def integer_tensors(
    state: Mapping[str, Tensor], config: VisionConfig, pictures: Iterable[np.ndarray], origin: object
) -> dict[str, Tensor]:
    """The tensors of `EfficientNetLite`, calibrated on batches of pictures uint8 [B, side, side, 3].

    Raises UserError for weights of another model and for no pictures.
    """
    layers = fold(state, config, origin)
    shared = _shared_scales(config)
    largest: dict[str, list[float]] = {}
    for batch in pictures:
        x = torch.from_numpy(batch).permute(0, 3, 1, 2).float().sub(127).mul(PIXEL_SCALE)
        for name, value in _activations(layers, config, x):
            largest.setdefault(shared.get(name, name), []).append(value)
    if not largest:
        raise UserError("there are no pictures to calibrate the encoder on: give a folder with pictures.")
    tensors = {
        "pixel_scale": torch.tensor(PIXEL_SCALE),
        "pooling": pooling_matrix(config.image_size // STRIDE),
    }
    scale_in = tensors["pixel_scale"]
    for name, layer in layers.items():
        peak = max(largest[shared.get(name, name)])
        scale_out = torch.tensor(peak / (127 if layer.sizes.is_linear else 255), dtype=torch.float32)
        rows = layer.weight.abs().amax((1, 2, 3)).clamp(min=1e-8)
        weight_scale = rows / 127
        q = torch.round(layer.weight / weight_scale[:, None, None, None]).clamp(-127, 127)
        bias = torch.round(layer.bias.double() / (scale_in.double() * weight_scale.double()))
        tensors |= {
            f"{name}.weight": (q + WEIGHT_ZERO).to(torch.uint8),
            f"{name}.bias": bias.clamp(-(2**30), 2**30).to(torch.int32),
            f"{name}.weight_scale": weight_scale,
            f"{name}.output_scale": scale_out,
        }
        scale_in = scale_out
    weight = _tensor(state, "_fc.weight", (config.num_classes, config.hidden_size), origin)
    bias = _tensor(state, "_fc.bias", (config.num_classes,), origin)
    # The network was trained to classify whole pictures; a stage may train the classifier of windows.
    for name in CLASSIFIERS:
        tensors |= {f"{name}.weight": weight.clone(), f"{name}.bias": bias.clone()}
    return tensors


def _shared_scales(config: VisionConfig) -> dict[str, str]:
    """Name of a projection -> the name under which its stage's range is kept: blocks with shortcuts share one."""
    shared: dict[str, str] = {}
    first = ""
    for block in blocks(config.width_multiplier, config.depth_multiplier):
        name = block.convolutions[-1].name
        if not block.has_shortcut:
            first = name
        shared[name] = first
    return shared


def _activations(
    layers: Mapping[str, FloatConvolution], config: VisionConfig, x: Tensor
) -> Iterable[tuple[str, float]]:
    """(layer, largest magnitude) of every map that is stored in bytes, for one batch."""
    x = layers["stem"](x)
    yield "stem", float(x.max())
    for block in blocks(config.width_multiplier, config.depth_multiplier):
        y = x
        for sizes in block.convolutions:
            y = layers[sizes.name](y)
            yield sizes.name, _peak(y) if sizes.is_linear else float(y.max())
        if block.has_shortcut:
            y = y + x
            yield block.convolutions[-1].name, _peak(y)
        x = y
    yield "head", float(layers["head"](x).max())


def _peak(x: Tensor) -> float:
    flat = x.abs().flatten()
    count = max(1, int(flat.numel() * TAIL))
    return float(flat.topk(count).values[-1])


def package_names(name: str) -> tuple[str, str]:
    """Names of a convolution and of its batch normalization in the package efficientnet-lite-pytorch."""
    if name == "stem":
        return "_conv_stem", "_bn0"
    if name == "head":
        return "_conv_head", "_bn1"
    _, number, part = name.split(".")
    convolution, norm = _BLOCK_NAMES[part]
    return f"_blocks.{number}.{convolution}", f"_blocks.{number}.{norm}"


def _tensor(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...], origin: object) -> Tensor:
    if name not in state or tuple(state[name].shape) != shape:
        raise UserError(
            f"{origin} has no '{name}' of {list(shape)}: it is no EfficientNet-Lite of this width and depth."
        )
    return state[name].detach().float()
