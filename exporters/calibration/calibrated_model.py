"""A model whose decoder was fitted to texts for eight or four bits, layer by layer.

Outliers of activations go into weights (`smoothing`), and four-bit weights are rounded so that outputs move least
(`compensated_rounding`). The inputs of a layer of four bits are those that the layers before it give once they are
rounded, so that it makes up for them, too. Parts other than the decoder, and layers that are packed already, are left
to `lowering.lower`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from microvlm.exporters.calibration.compensated_rounding import round_matrix
from microvlm.exporters.calibration.smoothing import ALONE, Sharing, rounding_of, smooth
from microvlm.exporters.smaller.samples import Sample
from microvlm.exporters.smaller.text_rows import Reader, batches
from microvlm.formats.op_table import INT4_MATMUL
from microvlm.formats.packing import GROUP, pack_nibbles
from microvlm.model.linear import PackedLinear
from microvlm.model.microvlm import MicroVLM

_TOGETHER = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Linears of a layer that see one input, in the order in which the layer runs them."""
Log = Callable[[str], None]


class _Stop(Exception):
    """Ends a forward pass at the layer that was reached."""


@torch.no_grad()
def calibrate(reader: Reader, samples: Sequence[Sample], bits: float, log: Log) -> MicroVLM:
    """The reader's model with a decoder for `bits`, 8 or 4, fitted to the samples; other parts are shared.

    At 8 bits its linears are still floats; at 4 they are packed.
    """
    model = copy.copy(reader.model)
    model._modules = dict(reader.model._modules)
    model.decoder = copy.deepcopy(reader.model.decoder)
    inputs = _inputs_of_decoder(Reader(model, reader.processor), samples)
    for number, layer in enumerate(model.decoder.layers):
        _smooth_layer(layer, inputs, bits)
        for names in _TOGETHER if bits == 4 else ():
            chosen = {name: layer.get_submodule(name) for name in names}
            chosen = {name: linear for name, linear in chosen.items() if _can_be_fitted(linear)}
            if chosen:
                seen = _seen(layer, next(iter(chosen)), inputs)
                moments = (seen.mT @ seen).double()
                for name, linear in chosen.items():
                    layer.set_submodule(name, _packed(linear, moments))
        inputs = [(layer(*call)[0], *call[1:]) for call in inputs]
        log(f"decoder layer {number + 1} of {len(model.decoder.layers)} fitted to {len(samples)} texts")
    for module in model.decoder.modules():
        if isinstance(module, PackedLinear):
            module._integers = None  # unpacked for the runs above
    return model


def _smooth_layer(layer: nn.Module, inputs: Sequence[tuple[Any, ...]], bits: float) -> None:
    """Move outliers of a layer's four inputs into its weights, as far as it has float weights."""
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    linears = {name: layer.get_submodule(name) for names in _TOGETHER for name in names}
    if not all(type(linear) is nn.Linear for linear in linears.values()):
        return
    config = attention.config
    heads = Sharing(config.num_attention_heads // config.num_key_value_heads, config.head_dim)  # type: ignore[union-attr,operator,arg-type]
    # SubLN stands between a linear and the input that it makes.
    makers: tuple[tuple[nn.Module, Sharing], ...] = (
        (layer.get_submodule("input_layernorm"), ALONE),
        _maker(attention.get_submodule("sub_norm"), linears["self_attn.v_proj"], heads),
        (layer.get_submodule("post_attention_layernorm"), ALONE),
        _maker(mlp.get_submodule("sub_norm"), linears["mlp.up_proj"], ALONE),
    )
    rounded = rounding_of(bits)
    for names, (maker, sharing) in zip(_TOGETHER, makers, strict=True):
        readers = [cast(nn.Linear, linears[name]) for name in names]
        smooth(_seen(layer, names[0], inputs), readers, maker, rounded, sharing)


def _maker(norm: nn.Module, linear: nn.Module, sharing: Sharing) -> tuple[nn.Module, Sharing]:
    return (linear, sharing) if isinstance(norm, nn.Identity) else (norm, ALONE)


def is_fitted(model: MicroVLM) -> bool:
    """Whether a model's decoder has weights that `calibrate` would fit."""
    return any(_can_be_fitted(module) for module in model.decoder.modules())


def _can_be_fitted(linear: nn.Module) -> bool:
    """Float weights, in groups of the packing; trits and packed layers stay as they are."""
    return type(linear) is nn.Linear and linear.in_features % GROUP == 0


def _inputs_of_decoder(reader: Reader, samples: Sequence[Sample]) -> list[tuple[Any, ...]]:
    """Arguments of the first layer's calls, one a batch of samples: the stream [B, S, H], rotations, mask, cache."""
    calls: list[tuple[Any, ...]] = []

    def listen(_: Any, arguments: tuple[Any, ...]) -> None:
        calls.append(arguments)
        raise _Stop

    handle = reader.model.decoder.layers[0].register_forward_pre_hook(listen)
    try:
        for part in batches([sample for sample in samples if sample.picture is None]):
            try:
                reader.logits([reader.row(sample) for sample in part], None)
            except _Stop:
                continue
    finally:
        handle.remove()
    return calls


def _seen(layer: nn.Module, name: str, inputs: Sequence[tuple[Any, ...]]) -> Tensor:
    """What the linear `name` of a layer sees when it runs on `inputs`, [n, K]; padding counts as little as it is."""
    seen: list[Tensor] = []

    def listen(_: Any, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0].reshape(-1, arguments[0].shape[-1]))
        raise _Stop

    handle = layer.get_submodule(name).register_forward_pre_hook(listen)
    try:
        for call in inputs:
            try:
                layer(*call)
            except _Stop:
                continue
    finally:
        handle.remove()
    return torch.cat(seen)


def _packed(linear: nn.Module, moments: Tensor) -> PackedLinear:
    assert isinstance(linear, nn.Linear)
    codes, multiplier, scale = round_matrix(linear.weight.float(), moments)
    tensors = {
        "packed": torch.from_numpy(pack_nibbles(codes.numpy())),
        "multiplier": multiplier.contiguous(),
        "scale": scale.contiguous(),
    }
    rows, columns = linear.weight.shape
    return PackedLinear(INT4_MATMUL.kind, rows, columns, tensors, linear.bias)
