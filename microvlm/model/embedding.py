"""The token embedding and its tied output head: float, trained for eight bits, or packed."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.formats.op_table import LOOKUP_BY_KIND
from microvlm.model import torch_ops
from microvlm.model.initial_values import normal
from microvlm.model.linear import PackedLinear, quantize_weight, quantized_product


class TiedEmbedding(nn.Module):
    """embed: int64 [...] -> float32 [..., H]; head: [..., H] -> logits [..., V]. `bits` 32, or 8 straight-through."""

    def __init__(self, vocab_size: int, width: int, bits: float):
        super().__init__()
        self.weight = nn.Parameter(normal(vocab_size, width, std=0.02))
        self.bits = bits

    def embed(self, input_ids: Tensor) -> Tensor:
        if self.bits == 32:
            return F.embedding(input_ids, self.weight)
        integers, scale = quantize_weight(self.weight, "int8")
        # Of the rows alone that are looked up: the table of a large vocabulary is much larger than a batch.
        latent = F.embedding(input_ids, self.weight)
        return latent + (integers[input_ids] * scale[input_ids].unsqueeze(-1) - latent).detach()

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
    """A packed table: `table` is the head's PackedLinear, and the lookup reads the same bytes."""

    def __init__(self, table: PackedLinear):
        super().__init__()
        self.table = table

    def embed(self, input_ids: Tensor) -> Tensor:
        table = self.table
        if not table.traced:
            return table.integers()[input_ids] * table.scale[input_ids].unsqueeze(-1)
        op = LOOKUP_BY_KIND[table.kind]
        return torch_ops.call(op, input_ids, table.weights, table.rows, table.columns)

    def head(self, hidden: Tensor) -> Tensor:
        return self.table(hidden)
