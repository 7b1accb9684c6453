"""Lowering: turns a trained model into the model that is stored and run, every weight packed in one format."""

from __future__ import annotations

import copy
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from microvlm.errors import UserError
from microvlm.formats.op_spec import OpSpec
from microvlm.formats.op_table import MATMUL_BY_KIND, MATMUL_BY_PACKING
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.convolution.efficientnet import EfficientNetLite, IntegerConvolution, InvertedResidual
from microvlm.model.embedding import HalfEmbedding, PackedEmbedding, TiedEmbedding
from microvlm.model.linear import (
    TERNARY_SCALE_FLOOR,
    DenseTritLinear,
    HalfLinear,
    Int8Linear,
    PackedLinear,
    TernaryLinear,
    int8_rows,
    ternarize,
)
from microvlm.model.microvlm import MicroVLM
from microvlm.sizes.weight_bytes import TERNARY_PARTS as TERNARY_PARTS

Layer: TypeAlias = nn.Linear | PackedLinear | DenseTritLinear | HalfLinear
LAYERS = (nn.Linear, PackedLinear, DenseTritLinear, HalfLinear)
INTEGER_BY_BITS = {op.bits: op for op in MATMUL_BY_KIND.values() if op.quantize is not None}
"""--bits -> the product that stores float weights rounded to integers: 8 and 4."""


@torch.no_grad()
def lower(model: MicroVLM, weights: WeightFormat) -> MicroVLM:
    """A copy of `model` in evaluation mode whose linears and embedding are stored in the format `weights`.

    Ternary-trained (or already packed) layers keep their trits at any width. Float-trained decoders are rounded:
    8 bits by row, 4 bits by group, or ternarised, which destroys a model that was not trained for it. A decoder
    that is already packed at 8 or 4 bits cannot be stored at another width (UserError).
    """
    # What the copy finds in `lowered` it takes instead of copying: latent weights are never in memory twice.
    lowered: dict[int, nn.Module] = {}
    for part, child in model.named_children():
        for module in child.modules():
            if module is model.embedding:
                stored: nn.Module = _embedding(model.embedding, weights.embedding_bits)
            elif isinstance(module, LAYERS) and part != "embedding":
                stored = _lower_linear(module, weights, part in TERNARY_PARTS)
            else:
                continue
            if stored is not module:
                lowered[id(module)] = stored
    # Packing is numpy's, so new bytes start on the CPU.
    return copy.deepcopy(model, lowered).eval().requires_grad_(False).to(model.memory_prior.device)


def set_traced(model: nn.Module, traced: bool) -> None:
    """Switch every layer in whole numbers between eager arithmetic and the custom op that an exporter has nodes for."""
    for module in model.modules():
        if isinstance(module, PackedLinear | IntegerConvolution | InvertedResidual | EfficientNetLite):
            module.traced = traced


def named_packed(model: nn.Module) -> dict[str, PackedLinear | DenseTritLinear]:
    """Every layer that quantises its activations, by its name in the model."""
    kinds = (PackedLinear, DenseTritLinear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def ternary_trained(model: nn.Module) -> bool:
    """Whether the decoder holds trits, latent or packed."""
    decoder = model.get_submodule("decoder")
    return any(
        isinstance(module, TernaryLinear | DenseTritLinear)
        or (isinstance(module, PackedLinear) and module.op.is_ternary)
        for module in decoder.modules()
    )


def _lower_linear(layer: Layer, weights: WeightFormat, ternary_part: bool) -> nn.Module:
    bias = None if layer.bias is None else layer.bias.detach().clone()
    if isinstance(layer, TernaryLinear):
        return store_trits(*ternarize(layer.weight), bias, weights)
    if isinstance(layer, DenseTritLinear):
        return store_trits(layer.weight.float(), layer.scale, bias, weights)
    if isinstance(layer, PackedLinear):
        if layer.op.is_ternary:
            return store_trits(layer.unpack(), layer.scale, bias, weights)
        if ternary_part and layer.op.bits != weights.bits:
            raise UserError(
                f"this decoder is already stored as {layer.kind}, which --bits {weights.bits:g} cannot be made from: "
                "export the checkpoint it was made from."
            )
        return layer
    if isinstance(layer, HalfLinear) and weights.bits >= 16:
        return layer
    if weights.bits == 1.58 and ternary_part:
        # In float32: the sums of a half layer would overflow float16.
        trits, scale = _least_squares_trits(layer.weight.float())
        return store_trits(trits, scale, bias, weights)
    trained_at_8 = isinstance(layer, Int8Linear)
    if trained_at_8 or weights.bits == 8 or (weights.bits < 8 and not ternary_part):
        return quantize_linear(INTEGER_BY_BITS[8], layer.weight, bias)
    if weights.bits == 4:
        return quantize_linear(INTEGER_BY_BITS[4], layer.weight, bias)
    return HalfLinear(layer.weight, bias) if weights.bits == 16 else layer


def store_trits(trits: Tensor, scale: Tensor, bias: Tensor | None, weights: WeightFormat) -> nn.Module:
    """Trits (as floats [N, K]) and their scale [1] or [N] in the storage of `weights`: one function at any width."""
    rows, columns = trits.shape
    scale = scale.clone()
    if weights.bits >= 16:
        return DenseTritLinear(trits, scale, bias, torch.float16 if weights.bits == 16 else torch.float32)
    op = INTEGER_BY_BITS.get(weights.bits, MATMUL_BY_PACKING[weights.packing])
    _refuse_long_rows(op, columns)
    operands = op.pack(trits.to(torch.int8).cpu().numpy())
    scale = scale if op.is_ternary else scale.expand(rows).contiguous()
    return _packed_linear(op, (*map(_tensor, operands), scale), rows, columns, bias)


def _least_squares_trits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Trits of `ternarize`, with the scale refitted: argmin_g |W - g T|^2 = <W, T> / <T, T>."""
    trits, _ = ternarize(weight)
    scale = (weight * trits).sum() / trits.square().sum().clamp(min=1.0)
    return trits, scale.clamp(min=TERNARY_SCALE_FLOOR).reshape(1)


def quantize_linear(op: OpSpec, weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """Float weights [N, K] rounded to the integers of `op`. Raises UserError for rows too long for exact sums."""
    rows, columns = weight.shape
    _refuse_long_rows(op, columns)
    assert op.quantize is not None
    return _packed_linear(op, tuple(map(_tensor, op.quantize(_numpy(weight)))), rows, columns, bias)


def _refuse_long_rows(op: OpSpec, columns: int) -> None:
    if columns > op.max_columns:
        wider = 8 if op.bits == 4 else 16
        raise UserError(
            f"--bits {op.bits:g} cannot store {columns} inputs (sums over 32 bits): use --bits {wider}."
        )


def _packed_linear(
    op: OpSpec, operands: tuple[Tensor, ...], rows: int, columns: int, bias: Tensor | None
) -> PackedLinear:
    return PackedLinear(op.kind, rows, columns, dict(zip(op.weight_names, operands, strict=True)), bias)


def _embedding(embedding: TiedEmbedding | HalfEmbedding | PackedEmbedding, bits: int) -> nn.Module:
    if isinstance(embedding, PackedEmbedding):
        if embedding.table.op.bits == bits:
            return embedding
        weight = embedding.table.unpack() * embedding.table.scale[:, None]
    elif isinstance(embedding, TiedEmbedding) and embedding.bits == 8 != bits:
        # Trained at eight bits: what the model computes with are the rounded rows, not the latent ones.
        integers, scale = int8_rows(embedding.weight)
        weight = integers * scale[:, None]
    else:
        weight = embedding.weight
    if bits == 32:
        wide = TiedEmbedding(0, 0, bits=32)
        wide.weight = nn.Parameter(weight.float().clone(), requires_grad=False)
        return wide
    if bits == 16:
        return HalfEmbedding(weight)
    return PackedEmbedding(quantize_linear(INTEGER_BY_BITS[bits], weight, None))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
