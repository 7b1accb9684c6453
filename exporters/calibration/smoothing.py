"""Takes outliers out of a decoder's activations, where the weights before and after them can make up for it exactly.

SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): activations are rounded to eight bits a token, and a channel that is
much larger than the others leaves these few steps. Dividing channel j by s_j and multiplying the weights that read it
by s_j changes nothing in floats. Norms and linears before the activation take the division, so no operator is added:
a layer's norm for q, k, v and for gate, up; up for down, whose activation is linear in it; v for o. With
s_j = max|x_j|^a / max|w_j|^(1 - a), a is chosen for each input by the error of the rounded products on real inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from microvlm.formats.op_table import INT4_MATMUL
from microvlm.model.linear import int8_rows
from microvlm.model.lowering import quantize_linear
from microvlm.model.torch_ops import quantize_activations

STRENGTHS = (0.0, 0.3, 0.45, 0.6, 0.75, 0.9)
"""Values of a that are tried; beside them s = 1."""
MOST_TOKENS = 512
"""Tokens of inputs that the choice is made on."""
_LEAST, _MOST = 1e-5, 1e3
Rounded = Callable[[Tensor], Tensor]
"""Weights -> what is left of them at the width of the export."""


def rounding_of(bits: float) -> Rounded:
    """How an export at `bits`, 8 or 4, rounds a weight matrix."""
    if bits == 8:

        def by_row(weight: Tensor) -> Tensor:
            integers, scale = int8_rows(weight)
            return integers * scale[:, None]

        return by_row

    def by_group(weight: Tensor) -> Tensor:
        layer = quantize_linear(INT4_MATMUL, weight, None)
        return layer.unpack() * layer.scale[:, None]

    return by_group


class Sharing(NamedTuple):
    """Channels that share a scale because few of them are made for many: `repeat` query heads read one KV head."""

    repeat: int = 1
    head: int = 1
    """Channels of a head."""

    def largest(self, values: Tensor) -> Tensor:
        """Values of channels [K] -> the largest of those that share a scale, [K / repeat]."""
        return values.view(-1, self.repeat, self.head).amax(1).reshape(-1)

    def spread(self, scale: Tensor) -> Tensor:
        """Scales [K / repeat] -> one a channel, [K]."""
        return scale.view(-1, 1, self.head).expand(-1, self.repeat, -1).reshape(-1)


ALONE = Sharing()


@torch.no_grad()
def smooth(
    inputs: Tensor, readers: Sequence[nn.Linear], maker: nn.Module, rounded: Rounded, sharing: Sharing = ALONE
) -> float | None:
    """Move outliers of `inputs` [n, K] into `readers`, the linears that see them -> the strength a; None for none.

    `maker` is the norm or the linear whose outputs these inputs are, or are a multiple of. Weights change in place.
    """
    weights = torch.cat([reader.weight for reader in readers])
    sample = inputs[:: max(1, len(inputs) // MOST_TOKENS)]
    largest = sharing.largest(inputs.abs().amax(0)).clamp(min=_LEAST)
    steepest = sharing.largest(weights.abs().amax(0)).clamp(min=_LEAST)
    exact = sample @ weights.mT
    best, chosen = _error(sample, weights, exact, rounded), None
    for strength in STRENGTHS:
        scale = largest**strength / steepest ** (1 - strength)
        scale = (scale / scale.log().mean().exp()).clamp(1 / _MOST, _MOST)
        wide = sharing.spread(scale)
        error = _error(sample / wide, weights * wide, exact, rounded)
        if error < best:
            best, chosen = error, (strength, scale)
    if chosen is None:
        return None
    strength, scale = chosen
    for reader in readers:
        reader.weight.mul_(sharing.spread(scale))
    weight, bias = maker.weight, getattr(maker, "bias", None)
    assert isinstance(weight, Tensor)
    weight.div_(scale if weight.ndim == 1 else scale[:, None])
    if bias is not None:
        bias.div_(scale)
    return strength


def _error(inputs: Tensor, weights: Tensor, exact: Tensor, rounded: Rounded) -> float:
    activations, step = quantize_activations(inputs)
    return float(((activations.float() * step) @ rounded(weights).mT - exact).square().sum())
