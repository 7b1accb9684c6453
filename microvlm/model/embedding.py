"""The token embedding and its tied output head, one object: float, trained for eight bits, or packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.model import torch_ops
from microvlm.model.linear import PackedLinear, quantized_product, rounded


class TiedEmbedding(nn.Module):
    """embed: int64 [...] -> float32 [..., H]; head: [..., H] -> logits [..., V]. `bits` 32, or 8 straight-through."""

    def __init__(self, vocab_size: int, width: int, bits: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, width) * 0.02)
        self.bits = bits

    def embed(self, input_ids: Tensor) -> Tensor:
        if self.bits == 32:
            return F.embedding(input_ids, self.weight)
        integers, scale = rounded(self.weight, "int8")
        table = self.weight + (integers * scale[:, None] - self.weight).detach()
        return F.embedding(input_ids, table)

    def head(self, hidden: Tensor) -> Tensor:
        if self.bits == 32:
            return F.linear(hidden, self.weight)
        return quantized_product(hidden, self.weight, "int8")


class HalfEmbedding(nn.Module):
    """A float16 table, computed in float32."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight.half())

    weight: Tensor

    def embed(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.weight).float()

    def head(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight.float())


class PackedEmbedding(nn.Module):
    """An int8 or int4 table: `table` is the head's PackedLinear, and the gather reads the same bytes."""

    def __init__(self, table: PackedLinear):
        super().__init__()
        self.table = table

    def embed(self, input_ids: Tensor) -> Tensor:
        table = self.table
        if not table.traced:
            return table.integers()[input_ids] * table.scale[input_ids].unsqueeze(-1)
        if table.kind == "int8":
            return torch_ops.int8_gather(input_ids, table.packed, table.scale)
        return torch_ops.int4_gather(input_ids, table.packed, table.multiplier, table.scale, table.columns)

    def head(self, hidden: Tensor) -> Tensor:
        return self.table(hidden)
