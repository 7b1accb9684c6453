"""A model without some of its decoder layers, memory slots or tokens. What stays is shared or gathered, not changed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from microvlm.model.embedding import HalfEmbedding, PackedEmbedding, TiedEmbedding
from microvlm.model.linear import HalfLinear, PackedLinear
from microvlm.model.microvlm import MicroVLM
from microvlm.sizes.smaller import with_vocabulary

Part = TypeVar("Part", bound=nn.Module)


def without_layers(model: MicroVLM, kept: Sequence[int]) -> MicroVLM:
    """`model` with the decoder layers `kept`, in this order, and the rows of W_M that write their keys and values."""
    text = dataclasses.replace(model.config.text, num_hidden_layers=len(kept))
    decoder = _shell(model.decoder)
    decoder.layers = nn.ModuleList(model.decoder.layers[layer] for layer in kept)
    decoder.config = text
    width = 2 * model.config.text.kv_width
    rows = torch.cat([torch.arange(layer * width, (layer + 1) * width) for layer in kept])
    projection = _shell(model.memory_projection)
    projection.linear = gather_outputs(model.memory_projection.linear, rows)  # type: ignore[assignment]
    projection.text = text
    smaller = _shell(model)
    smaller.decoder, smaller.memory_projection = decoder, projection
    smaller.config = dataclasses.replace(model.config, text=text)
    return smaller


def with_slots(model: MicroVLM, rotation: Tensor) -> MicroVLM:
    """`model` with a memory of k slots, whose keys are w Q for the keys w of the old one; `rotation` is Q [K, k].

    The columns of Q are orthonormal. The rows of M_ref are, too, so pinv(Q' M_ref) = pinv(M_ref) Q, and the empty
    memory of least squares is Q' R0.
    """
    encoder = _shell(model.memory_encoder)
    encoder.pseudo_inverse = model.memory_encoder.pseudo_inverse @ rotation
    smaller = _shell(model)
    smaller.memory_encoder = encoder
    smaller.memory_prior = nn.Parameter(rotation.mT @ model.memory_prior.detach(), requires_grad=False)
    memory = dataclasses.replace(model.config.memory, slots=rotation.shape[1])
    smaller.config = dataclasses.replace(model.config, memory=memory)
    return smaller


def with_tokens(model: MicroVLM, old_ids: Sequence[int]) -> MicroVLM:
    """`model` with the rows `old_ids` of its embedding and tied head, in this order."""
    rows = torch.tensor(old_ids)
    old: nn.Module = model.embedding
    smaller = _shell(model)
    table: nn.Module
    if isinstance(old, PackedEmbedding):
        table = PackedEmbedding(_gather_packed(old.table, rows))
    elif isinstance(old, HalfEmbedding):
        table = HalfEmbedding(old.weight[rows])
    else:
        assert isinstance(old, TiedEmbedding)
        table = _shell(old)
        table.weight = nn.Parameter(old.weight.detach()[rows], requires_grad=False)
    smaller._modules["embedding"] = table
    smaller.config = with_vocabulary(model.config, len(old_ids))
    return smaller


def gather_outputs(layer: nn.Module, rows: Tensor) -> nn.Module:
    """A linear layer with these rows of its weights alone. Its bytes have one row a byte, as W_M's have."""
    if isinstance(layer, PackedLinear):
        return _gather_packed(layer, rows)
    if isinstance(layer, HalfLinear):
        return HalfLinear(layer.weight[rows], None if layer.bias is None else layer.bias[rows])
    assert isinstance(layer, nn.Linear)
    smaller = _shell(layer)
    smaller.out_features = len(rows)
    smaller.weight = nn.Parameter(layer.weight.detach()[rows], requires_grad=False)
    if layer.bias is not None:
        smaller.bias = nn.Parameter(layer.bias.detach()[rows], requires_grad=False)
    return smaller


def _gather_packed(layer: PackedLinear, rows: Tensor) -> PackedLinear:
    if layer.op.rows_per_byte != 1:
        raise RuntimeError(f"rows of {layer.kind} share bytes")
    tensors = {name: tensor[rows] for name, tensor in layer.weights.items()}
    return PackedLinear(
        layer.kind, len(rows), layer.columns, tensors, None if layer.bias is None else layer.bias[rows]
    )


def _shell(module: Part) -> Part:
    """A copy that shares every part with `module`, and whose parts can be replaced without changing it."""
    shell = copy.copy(module)
    for name in ("_modules", "_parameters", "_buffers"):
        shell.__dict__[name] = dict(module.__dict__[name])
    return shell
