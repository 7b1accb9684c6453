"""The tensors of a pretrained encoder or decoder under the model's own names, held against a configuration.

Raises UserError for a name that is missing or unexpected and for another shape or dtype, before any tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.formats.weight_shapes import weight_shapes
from microvlm.model.pretrained.bitnet import BitNetLayers, unpack_bitnet
from microvlm.model.pretrained.float_weights import float_weights
from microvlm.model.pretrained.hf_config import BitNet
from microvlm.model.pretrained.stored_weights import (
    KEPT_DTYPES,
    PartWeights,
    folder_weights,
    require_names,
)
from microvlm.model.tensor_writer import LazyTensor

UNUSED_VISION_PREFIXES = (
    "pooler.",
    "classifier.",
    "cls_classifier.",
    "distillation_classifier.",
    "embeddings.mask_token",
)
"""Key prefixes of heads that a feature extractor does not have."""

_VISION_LAYER = {"norm_before": "layernorm_before", "norm_after": "layernorm_after"}
_VISION_LAYER_OLD = _VISION_LAYER | {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "output": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
_VISION_LAYER_NEW = _VISION_LAYER | {
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "output": "attention.o_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_PATCHES = "embeddings.patch_embeddings.projection.weight"
_VISION_TOP = {
    "cls_token": "embeddings.cls_token",
    "distillation_token": "embeddings.distillation_token",
    "position_embeddings": "embeddings.position_embeddings",
    "patch_embedding.weight": _PATCHES,
    "patch_embedding.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def vision_tensors(folder: Path, config: MicroVLMConfig) -> dict[str, LazyTensor]:
    """The tensors `vision.*` of a ViT/DeiT folder: a bare encoder, or a classifier with one."""
    weights = folder_weights(folder)
    tensors = {
        key.removeprefix("vit.").removeprefix("deit."): value for key, value in weights.tensors.items()
    }
    tensors = {key: value for key, value in tensors.items() if not key.startswith(UNUSED_VISION_PREFIXES)}
    is_old = any(key.startswith("encoder.layer.") for key in tensors)
    patches = tensors.get(_PATCHES)
    if patches is not None and len(patches.shape) == 4:
        # A convolution over patches is a linear over flattened patches: channel, row, column.
        shape = (patches.shape[0], prod(patches.shape[1:]))
        tensors[_PATCHES] = patches.converted(lambda value: value.flatten(1), shape)
    shapes = _shapes_of(config, "vision.")
    _require_weights(PartWeights(weights.origin, tensors), shapes)
    names = {key: _vision_name(key.removeprefix("vision."), is_old) for key in shapes}
    return _named(PartWeights(weights.origin, tensors), names, shapes)


def checkpoint_vision_tensors(folder: Path) -> dict[str, LazyTensor]:
    """The tensors `vision.*` of a MicroVLM checkpoint, as the float values that its encoder computes with."""
    tensors = {name: t for name, t in float_weights(folder).items() if name.startswith("vision.")}
    return {
        name: LazyTensor(tuple(t.shape), t.dtype, partial(Tensor.clone, t)) for name, t in tensors.items()
    }


def decoder_tensors(
    weights: PartWeights, config: MicroVLMConfig, bitnet: BitNet | None = None
) -> tuple[dict[str, LazyTensor], BitNetLayers]:
    """(the tensors `decoder.*` and `embedding.*` of a Qwen2/Llama decoder, the layers of a BitNet one that are packed).

    `weights` have the names of transformers. Norms of SubLN that it lacks are ones. `bitnet` says how trits are stored.
    """
    tensors = {
        key: value for key, value in weights.tensors.items() if not key.endswith(".rotary_emb.inv_freq")
    }
    head = tensors.pop(_HEAD, None)
    if head is not None:
        _require_tied(head, tensors.get(_EMBEDDING), weights.origin)
    shapes = {**_shapes_of(config, "decoder."), **_shapes_of(config, "embedding.")}
    layers: BitNetLayers = {}
    packed: dict[str, LazyTensor] = {}
    if bitnet is not None and bitnet.is_packed:
        weights = PartWeights(weights.origin, tensors)
        tensors, packed, layers = unpack_bitnet(weights, bitnet, _linear_names(shapes), shapes)
        shapes = {key: shape for key, shape in shapes.items() if key.removesuffix(".weight") not in layers}
    names = {key: _decoder_name(key, tensors) for key in shapes}
    for key, shape in shapes.items():
        if key.endswith("sub_norm.weight") and names[key] not in tensors:
            tensors[names[key]] = LazyTensor(shape, torch.float32, _ones(shape).clone)
    weights = PartWeights(weights.origin, tensors)
    if not packed:
        _require_weights(weights, shapes)
    return _named(weights, names, shapes) | packed, layers


def _shapes_of(config: MicroVLMConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in weight_shapes(config).items() if key.startswith(prefix)}


def _linear_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Our name of each linear layer of the decoder -> that of transformers."""
    keys = [key for key, shape in shapes.items() if key.startswith("decoder.") and len(shape) == 2]
    return {key.removesuffix(".weight"): _decoder_name(key, {}).removesuffix(".weight") for key in keys}


def _decoder_name(key: str, tensors: Mapping[str, object]) -> str:
    """Our key as transformers names it. BitNet has names of its own for the norms of SubLN."""
    if key == "embedding.weight":
        return _EMBEDDING
    name = "model." + key.removeprefix("decoder.")
    own = name.replace("self_attn.sub_norm", "self_attn.attn_sub_norm").replace(
        "mlp.sub_norm", "mlp.ffn_sub_norm"
    )
    return own if own in tensors else name


def _named(
    weights: PartWeights, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, LazyTensor]:
    """The tensors by our keys. `names` are those of the files, which errors use."""
    require_names(weights, names.values())
    for key, name in names.items():
        tensor = weights.tensors[name]
        if tensor.shape != shapes[key]:
            raise UserError(
                f"{weights.origin}: '{name}' is {tensor.shape}, not {shapes[key]} as its config.json says."
            )
        if not tensor.dtype.is_floating_point:
            raise UserError(
                f"{weights.origin}: '{name}' holds {tensor.dtype}; only float weights are supported."
            )
    return {key: _at_its_precision(weights.tensors[name]) for key, name in names.items()}


def _at_its_precision(tensor: LazyTensor) -> LazyTensor:
    if tensor.dtype in KEPT_DTYPES:
        return tensor
    return LazyTensor(tensor.shape, torch.float32, lambda: tensor.read().float())


def _require_tied(head: LazyTensor, embedding: LazyTensor | None, origin: str) -> None:
    if embedding is None or head.shape != embedding.shape or not torch.equal(head.read(), embedding.read()):
        raise UserError(
            f"{origin}: 'lm_head.weight' differs from the embedding; only tied output heads are supported."
        )


def _require_weights(weights: PartWeights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError if `shapes` have more than twice the weights that are stored.

    So a configuration of absurd sizes is told apart from a file of another model. Names and shapes are compared later.
    """
    stored = sum(prod(tensor.shape) for tensor in weights.tensors.values())
    needed = sum(map(prod, shapes.values()))
    if needed > 2 * stored:
        raise UserError(
            f"{weights.origin} holds {stored:,} weights, and its config.json describes {needed:,}: "
            "copy the checkpoint again."
        )


def _vision_name(key: str, is_old: bool) -> str:
    """Convert our key to the name in the hub's files (`is_old`), or to that of transformers 5."""
    if not key.startswith("layers."):
        return _VISION_TOP[key]
    _, index, part, leaf = key.split(".")
    layers, parts = ("encoder.layer", _VISION_LAYER_OLD) if is_old else ("layers", _VISION_LAYER_NEW)
    return f"{layers}.{index}.{parts[part]}.{leaf}"


def _ones(shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape)
