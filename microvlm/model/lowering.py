"""Lowering: a trained model to the model that is stored and run, every weight in the bytes of one storage format."""

from __future__ import annotations

import copy
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from microvlm.errors import UserError
from microvlm.formats import packing as layouts
from microvlm.formats.op_table import TERNARY_LAYOUTS
from microvlm.formats.weight_format import PACKINGS, WeightFormat
from microvlm.model.embedding import HalfEmbedding, PackedEmbedding, TiedEmbedding
from microvlm.model.linear import (
    DenseTritLinear,
    HalfLinear,
    Int8Linear,
    PackedLinear,
    TernaryLinear,
    int8_rows,
    ternarize,
)
from microvlm.model.microvlm import MicroVLM

TERNARY_PARTS = ("decoder", "memory_encoder")
"""Parts whose linears are ternary at 1.58 bits; the rest (vision, adapter, W_M, scope) stays at 8 bits or wider."""

Layer: TypeAlias = nn.Linear | PackedLinear | DenseTritLinear | HalfLinear
LAYERS = (nn.Linear, PackedLinear, DenseTritLinear, HalfLinear)


@torch.no_grad()
def lower(model: MicroVLM, weights: WeightFormat) -> MicroVLM:
    """A copy of `model` in evaluation mode whose linears and embedding hold the bytes of `weights`.

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
    """Switch every packed layer between eager arithmetic and the custom op that an exporter keeps as one node."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.traced = traced


def named_packed(model: nn.Module) -> dict[str, PackedLinear | DenseTritLinear]:
    """Every layer with activation codes, by its name in the model."""
    kinds = (PackedLinear, DenseTritLinear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def ternary_trained(model: nn.Module) -> bool:
    """Whether the decoder holds trits, latent or packed."""
    kinds = {layer.kind for layer in named_packed(model.get_submodule("decoder")).values()}
    trained = any(isinstance(module, TernaryLinear) for module in model.get_submodule("decoder").modules())
    return trained or bool(kinds & (set(TERNARY_LAYOUTS) | {"dense"}))


def _lower_linear(layer: Layer, weights: WeightFormat, ternary_part: bool) -> nn.Module:
    bias = None if layer.bias is None else layer.bias.detach().clone()
    if isinstance(layer, TernaryLinear):
        return store_trits(*ternarize(layer.weight), bias, weights)
    if isinstance(layer, DenseTritLinear):
        return store_trits(layer.weight.float(), layer.scale, bias, weights)
    if isinstance(layer, PackedLinear):
        if layer.kind in TERNARY_LAYOUTS:
            return store_trits(layer.unpack(), layer.scale, bias, weights)
        if ternary_part and {"int8": 8, "int4": 4}[layer.kind] != weights.bits:
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
        return _int8(layer.weight, bias)
    if weights.bits == 4:
        return _int4(layer.weight, bias)
    return HalfLinear(layer.weight, bias) if weights.bits == 16 else layer


def store_trits(trits: Tensor, scale: Tensor, bias: Tensor | None, weights: WeightFormat) -> nn.Module:
    """Trits (as floats [N, K]) and their scale [1] or [N] in the storage of `weights`: one function at any width."""
    rows, columns = trits.shape
    scale = scale.clone()
    if weights.bits >= 16:
        return DenseTritLinear(trits, scale, bias, torch.float16 if weights.bits == 16 else torch.float32)
    integers = trits.to(torch.int8).cpu().numpy()
    if weights.bits == 1.58:
        kind = PACKINGS[weights.packing]
        packed = {"packed": _tensor(layouts.pack_trits(integers, TERNARY_LAYOUTS[kind])), "scale": scale}
        return PackedLinear(kind, rows, columns, packed, bias)
    per_row = scale.expand(rows).contiguous()
    if weights.bits == 8:
        bytes8 = _tensor((integers.astype(np.int16) + 128).astype(np.uint8))
        return PackedLinear("int8", rows, columns, {"packed": bytes8, "scale": per_row}, bias)
    padded = np.zeros((rows, -(-columns // layouts.GROUP) * layouts.GROUP), np.int8)
    padded[:, :columns] = integers
    multiplier = np.ones((rows, padded.shape[1] // layouts.GROUP), np.uint8)
    tensors = {
        "packed": _tensor(layouts.pack_nibbles(padded)),
        "multiplier": _tensor(multiplier),
        "scale": per_row,
    }
    return PackedLinear("int4", rows, columns, tensors, bias)


def _least_squares_trits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Trits of `ternarize`, with the scale refitted: argmin_g |W - g T|^2 = <W, T> / <T, T>."""
    trits, _ = ternarize(weight)
    scale = (weight * trits).sum() / trits.square().sum().clamp(min=1.0)
    return trits, scale.clamp(min=1e-5).reshape(1)


def _int8(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    packed, scale = layouts.quantize_rows_int8(_numpy(weight))
    rows, columns = weight.shape
    return PackedLinear("int8", rows, columns, {"packed": _tensor(packed), "scale": _tensor(scale)}, bias)


def _int4(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    if weight.shape[1] > layouts.INT4_MAX_COLUMNS:
        raise UserError(f"--bits 4 cannot store {weight.shape[1]} inputs (sums over 32 bits): use --bits 8.")
    packed, multiplier, scale = layouts.quantize_groups_int4(_numpy(weight))
    tensors = {"packed": _tensor(packed), "multiplier": _tensor(multiplier), "scale": _tensor(scale)}
    rows, columns = weight.shape
    return PackedLinear("int4", rows, columns, tensors, bias)


def _embedding(embedding: TiedEmbedding | HalfEmbedding | PackedEmbedding, bits: int) -> nn.Module:
    if isinstance(embedding, PackedEmbedding):
        stored = {"int8": 8, "int4": 4}[embedding.table.kind]
        if stored == bits:
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
    return PackedEmbedding(_int8(weight, None) if bits == 8 else _int4(weight, None))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
