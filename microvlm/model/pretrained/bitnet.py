"""BitNet checkpoints in the packed layout of transformers: trits of a decoder's linear layers, two bits each.

A packed weight is uint8 [rows / 4, columns]: bits 2p and 2p + 1 of byte (r, k) are the trit of row p * rows / 4 + r,
plus one. `weight_scale` [1] belongs to it. The layers are stored packed here too, so that no trit or scale is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.formats.lowered_layer import LoweredLayer
from microvlm.formats.op_table import TERNARY_2X4
from microvlm.model.pretrained.hf_config import BitNet
from microvlm.model.pretrained.stored_weights import PartWeights
from microvlm.model.tensor_writer import LazyTensor

BitNetLayers = dict[str, LoweredLayer]
"""Our name of a packed layer -> what it takes to build it."""
_ROWS_PER_BYTE = 4


def unpack_bitnet(
    weights: PartWeights, bitnet: BitNet, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor], BitNetLayers]:
    """(the other tensors by their names, the packed ones by ours, the packed layers).

    `names`: our names of the linear layers and those in the files. Raises UserError for a layer that is not packed, or
    of another shape.
    """
    others, packed, layers = dict(weights.tensors), {}, {}
    for ours, theirs in names.items():
        rows, columns = shapes[f"{ours}.weight"]
        weight, scale = others.pop(f"{theirs}.weight", None), others.pop(f"{theirs}.weight_scale", None)
        if weight is None or scale is None or weight.dtype != torch.uint8:
            raise UserError(
                f"{weights.origin}: {quote(theirs)} is not packed with a scale, as its config.json says."
            )
        if (
            rows % _ROWS_PER_BYTE
            or weight.shape != (rows // _ROWS_PER_BYTE, columns)
            or scale.shape not in ((), (1,))
        ):
            raise UserError(
                f"{weights.origin}: {quote(theirs)} is {weight.shape}, which is not {rows} x {columns} packed trits."
            )
        origin = f"{weights.origin}: {theirs}"
        packed[f"{ours}.packed"] = LazyTensor(
            _packed_shape(rows, columns), torch.uint8, _Repacked(weight, rows, origin)
        )
        packed[f"{ours}.scale"] = LazyTensor((1,), torch.float32, _Scale(scale, bitnet.divides, origin))
        layers[ours] = LoweredLayer(kind=TERNARY_2X4.kind, rows=rows, columns=columns, scale=1, bias=False)
    return others, packed, layers


def unpack_trits(packed: Tensor) -> Tensor:
    """uint8 [rows / 4, columns] -> int8 trits [rows, columns]; 2 for a code that is no trit."""
    planes = [(packed >> shift) & 3 for shift in range(0, 2 * _ROWS_PER_BYTE, 2)]
    return torch.cat(planes).to(torch.int8) - 1


def _packed_shape(rows: int, columns: int) -> tuple[int, ...]:
    return TERNARY_2X4.weight_types(rows, columns, scales=1)["packed"][0]


class _Repacked:
    """Reads a weight and packs it as this package does."""

    def __init__(self, weight: LazyTensor, rows: int, origin: str):
        self._weight, self._rows, self._origin = weight, rows, origin

    def __call__(self) -> Tensor:
        trits = unpack_trits(self._weight.read())
        if trits.numel() and trits.max() > 1:
            raise UserError(f"{self._origin} has codes that are no trits: copy the checkpoint again.")
        (packed,) = TERNARY_2X4.pack(trits.numpy())
        return torch.from_numpy(packed)


class _Scale:
    """Reads a scale, float32 [1]: what one trit is worth."""

    def __init__(self, scale: LazyTensor, divides: bool, origin: str):
        self._scale, self._divides, self._origin = scale, divides, origin

    def __call__(self) -> Tensor:
        value = self._scale.read().float().reshape(1)
        value = 1 / value if self._divides else value
        if not torch.isfinite(value).all():
            raise UserError(f"{self._origin} has a scale that is no number: copy the checkpoint again.")
        return value
