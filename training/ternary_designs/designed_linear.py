"""Ternary layers of other designs than the shipped one: scales by row or group, and a rotation before the product.

They train straight through both quantisers, in float: the same products for all designs, so that these differ in
nothing else. None is exported.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.bench.training.ternary_design import TernaryDesign
from microvlm.model import torch_ops
from microvlm.model.linear import TERNARY_SCALE_FLOOR, TernaryLinear


def rotate(x: Tensor, width: int) -> Tensor:
    """Each block of `width` columns of [..., K] times a Hadamard matrix with orthonormal rows; width divides K.

    Products keep their value where inputs and weights are rotated alike, while large values spread over their block
    (QuaRot, arXiv 2404.00456, section 3).
    """
    return (x.unflatten(-1, (-1, width)) @ hadamard(width, x)).flatten(-2)


def hadamard(width: int, like: Tensor) -> Tensor:
    """Sylvester's orthonormal matrix [width, width], symmetric; width is a power of two."""
    matrix = like.new_ones(1, 1)
    while matrix.shape[0] < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(width)


def round_to_trits(weight: Tensor, group: int | None) -> Tensor:
    """float [N, K] -> the values g * trit [N, K], g = mean |W| of a matrix (None), row (0) or `group` columns.

    A row's last group has fewer columns where `group` does not divide K.
    """
    if group is None:
        groups = [weight]
        scales = [weight.abs().mean().reshape(1, 1)]
    else:
        groups = list(weight.split(group or weight.shape[1], 1))
        scales = [part.abs().mean(1, keepdim=True) for part in groups]
    floor = TERNARY_SCALE_FLOOR
    parts = [
        (part / scale.clamp(min=floor)).round().clamp(-1, 1) * scale.clamp(min=floor)
        for part, scale in zip(groups, scales, strict=True)
    ]
    return torch.cat(parts, 1)


class DesignedLinear(nn.Module):
    """[..., K] -> [..., N] with the latent weight and bias of a TernaryLinear, whose parameters it takes over."""

    def __init__(self, layer: TernaryLinear, design: TernaryDesign):
        super().__init__()
        self.design = design
        self.weight, self.bias = layer.weight, layer.bias
        width = design.rotation
        self.rotation = width if width and self.weight.shape[1] % width == 0 else 0
        if self.rotation:
            with torch.no_grad():
                self.weight.copy_(rotate(self.weight, self.rotation))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        with torch_ops.full_precision(x.device.type):
            if self.rotation:
                x = rotate(x, self.rotation)
            with torch.no_grad():
                integers, scale = torch_ops.quantize_activations(x)
                rounded = round_to_trits(self.weight, self.design.group)
            # Values of the quantisers, gradients of what went into them.
            x = x + (integers * scale - x).detach()
            weight = self.weight + (rounded - self.weight).detach()
        return F.linear(x, weight, self.bias)


def redesign(decoder: nn.Module, design: TernaryDesign) -> None:
    """Replace every TernaryLinear inside a module by a layer of a design with the same parameters."""
    for name, module in list(decoder.named_modules()):
        if isinstance(module, TernaryLinear):
            parent, _, own = name.rpartition(".")
            setattr(decoder.get_submodule(parent), own, DesignedLinear(module, design))
