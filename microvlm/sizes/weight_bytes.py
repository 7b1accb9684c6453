"""The lowered layers of an export, and the bytes of each of its tensors, from what a checkpoint's header says.

Mirrors `microvlm.model.lowering.lower`, which needs torch and the weights; a test holds the two equal at every width.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from microvlm.config import MicroVLMConfig
from microvlm.formats.lowered_layer import DENSE_KINDS, FLOAT_EMBEDDING, HALF, HALF_EMBEDDING, LoweredLayer
from microvlm.formats.op_table import MATMUL_BY_KIND, MATMUL_BY_PACKING
from microvlm.formats.weight_format import WeightFormat
from microvlm.formats.weight_shapes import stored_types, weight_shapes

TERNARY_PARTS = ("decoder", "memory_encoder")
"""Parts whose linears are ternary at 1.58 bits; the rest (vision, adapter, W_M, scope) stays at 8 bits or wider."""
_KIND_BY_BITS = {op.bits: op.kind for op in MATMUL_BY_KIND.values() if op.quantize is not None}
_WIDTHS = {"uint8": 1, "int32": 4}
_FLOAT, _HALF = 4, 2


def lowered_layers(
    config: MicroVLMConfig, layers: Mapping[str, LoweredLayer], weights: WeightFormat
) -> dict[str, LoweredLayer]:
    """The layers that `lower` makes of a checkpoint of `config` with the lowered `layers`, by name.

    A layer that cannot be stored at that width (`lower` refuses it) is listed as it is.
    """
    shapes = weight_shapes(config)
    result: dict[str, LoweredLayer] = {}
    for name, shape in shapes.items():
        owner, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(shape) != 2 or owner == "embedding":
            continue
        bias = f"{owner}.bias" in shapes
        layer = _layer(config, owner, layers.get(owner), weights, shape)
        if layer is not None:
            kind, scale = layer
            result[owner] = LoweredLayer(kind=kind, rows=shape[0], columns=shape[1], scale=scale, bias=bias)
    result |= _embedding(config, layers, weights)
    return result


def _layer(
    config: MicroVLMConfig,
    name: str,
    source: LoweredLayer | None,
    weights: WeightFormat,
    shape: tuple[int, ...],
) -> tuple[str, int | None] | None:
    """(kind, number of scales) of a lowered linear; None for one that stays float32."""
    part, rows = name.partition(".")[0], shape[0]
    is_body = part in TERNARY_PARTS
    trained = config.quantization.decoder_bits if is_body else config.quantization.vision_bits
    kind = source.kind if source is not None else None
    stored = MATMUL_BY_KIND.get(kind) if kind is not None else None
    if (
        kind in DENSE_KINDS
        or (stored is not None and stored.is_ternary)
        or (kind is None and trained == 1.58)
    ):
        return _trits((source.scale if source is not None else None) or 1, rows, weights)
    if stored is not None:
        return stored.kind, rows
    if kind == HALF and weights.bits >= 16:
        return HALF, None
    if weights.bits == 1.58 and is_body:
        return MATMUL_BY_PACKING[weights.packing].kind, 1
    if (kind is None and trained == 8) or weights.bits == 8 or (weights.bits < 8 and not is_body):
        return _KIND_BY_BITS[8], rows
    if weights.bits == 4:
        return _KIND_BY_BITS[4], rows
    return (HALF, None) if weights.bits == 16 else None


def _trits(scales: int, rows: int, weights: WeightFormat) -> tuple[str, int]:
    if weights.bits >= 16:
        return f"dense-float{weights.bits:g}", scales
    if weights.bits in _KIND_BY_BITS:
        return _KIND_BY_BITS[weights.bits], rows
    return MATMUL_BY_PACKING[weights.packing].kind, scales


def _embedding(
    config: MicroVLMConfig, layers: Mapping[str, LoweredLayer], weights: WeightFormat
) -> dict[str, LoweredLayer]:
    rows, columns = config.text.vocab_size, config.text.hidden_size
    bits = weights.embedding_bits
    if bits in _KIND_BY_BITS:
        packed = LoweredLayer(kind=_KIND_BY_BITS[bits], rows=rows, columns=columns, scale=rows, bias=False)
        return {"embedding.table": packed}
    if bits == 16:
        return {"embedding": LoweredLayer(kind=HALF_EMBEDDING, rows=rows, columns=columns)}
    if config.quantization.embedding_bits != 32:
        return {"embedding": LoweredLayer(kind=FLOAT_EMBEDDING, rows=rows, columns=columns)}
    return {}


def tensor_bytes(config: MicroVLMConfig, layers: Mapping[str, LoweredLayer]) -> dict[str, int]:
    """Bytes of every tensor of a model whose `layers` are lowered, by name."""
    halves = {
        f"{name}.weight"
        for name, layer in layers.items()
        if layer.kind in (HALF, HALF_EMBEDDING, "dense-float16")
    }
    return {
        name: prod(kind.shape) * (_HALF if name in halves else _WIDTHS.get(kind.kind, _FLOAT))
        for name, kind in stored_types(config, layers, "the export").items()
    }


def weight_bytes(config: MicroVLMConfig, layers: Mapping[str, LoweredLayer], weights: WeightFormat) -> int:
    """Bytes of all tensors of an export of a checkpoint of `config` whose file lists `layers`."""
    return sum(tensor_bytes(config, lowered_layers(config, layers, weights)).values())
