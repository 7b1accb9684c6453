"""THE table of graphs: every input and output of every ONNX file of a bundle, by name, dtype and symbolic shape.

Exporter, backends, checks and documents read it; nothing else names a tensor. Needs neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.formats.manifest import MANIFEST, GraphEntry, TensorEntry

OPSET = 23
"""ONNX Runtime reads it from 1.24 on; 1.25 is the first whose AMX kernels sum every integer product rightly."""

BATCH, SEQUENCE, PAST, TOTAL, KEPT = "batch", "sequence", "past", "past + sequence", "kept"
"""Symbolic dimensions. `past` counts the memory slot, which is position 0 and always there."""

Dim = int | str


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: str
    """numpy's name: float32 or int64."""
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file. `method` is the function of `MicroVLM` that it holds."""

    name: str
    method: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def file(self) -> str:
        return f"onnx/{self.name}.onnx"


def kv_names(prefix: str, layers: int) -> list[str]:
    """Flat key/value names, layer by layer: PREFIX.0.key, PREFIX.0.value, PREFIX.1.key, ..."""
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _kv(config: MicroVLMConfig, prefix: str, length: Dim) -> tuple[TensorSpec, ...]:
    text = config.text
    shape = (BATCH, text.num_key_value_heads, length, text.head_dim)
    return tuple(TensorSpec(name, "float32", shape) for name in kv_names(prefix, text.num_hidden_layers))


def graphs(config: MicroVLMConfig) -> tuple[GraphSpec, ...]:
    """Every graph of a bundle of this configuration, in the order of the data path."""
    side, width = config.vision.image_size, config.text.hidden_size
    slots, code = config.memory.slots, config.memory.code_size
    pixels = TensorSpec("pixel_values", "float32", (BATCH, 3, side, side))
    features = TensorSpec("image_features", "float32", (BATCH, config.prefix_tokens, width))
    ids = TensorSpec("input_ids", "int64", (BATCH, SEQUENCE))
    embeds = TensorSpec("inputs_embeds", "float32", (BATCH, SEQUENCE, width))
    mask = TensorSpec("attention_mask", "int64", (BATCH, SEQUENCE))
    total_mask = TensorSpec("attention_mask", "int64", (BATCH, TOTAL))
    positions = TensorSpec("position_ids", "int64", (BATCH, SEQUENCE))
    keep = TensorSpec("num_logits_to_keep", "int64", ())
    z = TensorSpec("memory_code", "float32", (BATCH, code))
    w = TensorSpec("memory_key", "float32", (BATCH, slots))
    mean = TensorSpec("memory_mean", "float32", (BATCH, slots, code))
    cov = TensorSpec("memory_cov", "float32", (BATCH, slots, slots))
    mean_out = TensorSpec("memory_mean_out", "float32", mean.shape)
    cov_out = TensorSpec("memory_cov_out", "float32", cov.shape)
    recalled = TensorSpec("memory_code_out", "float32", z.shape)
    scope = TensorSpec("memory_scope", "float32", (BATCH,))
    residual = TensorSpec("memory_residual", "float32", (BATCH,))
    logits = TensorSpec("logits", "float32", (BATCH, KEPT, config.text.vocab_size))
    return (
        GraphSpec("vision_encoder", "encode_image", (pixels,), (features,)),
        GraphSpec("embed_tokens", "embed", (ids,), (embeds,)),
        GraphSpec("memory_encode", "memory_encode", (embeds, mask), (z, w)),
        GraphSpec("memory_write", "memory_write", (w, z, mean, cov), (mean_out, cov_out)),
        GraphSpec("memory_forget", "memory_forget", (w, z, mean, cov), (mean_out, cov_out)),
        GraphSpec(
            "memory_read",
            "memory_read",
            (w, z, mean, cov),
            (recalled, scope, residual, *_kv(config, "memory_kv", 1)),
        ),
        GraphSpec(
            "decoder_model_merged",
            "decode",
            (embeds, total_mask, positions, keep, *_kv(config, "past_key_values", PAST)),
            (logits, *_kv(config, "present", TOTAL)),
        ),
    )


def graph(config: MicroVLMConfig, name: str) -> GraphSpec:
    return next(spec for spec in graphs(config) if spec.name == name)


def require_graphs(config: MicroVLMConfig, entries: Mapping[str, GraphEntry], folder: Path) -> None:
    """Raise UserError unless the manifest of `folder` lists the graphs of its config.json, with the same tensors.

    So that no size of either is believed before memory is taken by it. Further graphs are of a later version, and
    free dimensions may have other names.
    """
    for spec in graphs(config):
        if spec.name not in entries:
            raise UserError(
                f"{folder / MANIFEST} lacks the graph {spec.name}: copy or export the bundle again."
            )
        entry = entries[spec.name]
        for side, ours, theirs in (
            ("inputs", spec.inputs, entry.inputs),
            ("outputs", spec.outputs, entry.outputs),
        ):
            if len(ours) != len(theirs):
                raise UserError(
                    f"{folder}: {spec.name} has {len(theirs)} {side} by manifest.json and {len(ours)} by config.json: "
                    "copy or export the bundle again."
                )
            for tensor, listed in zip(ours, theirs, strict=True):
                if not _is_same(tensor, listed):
                    raise UserError(
                        f"{folder}: {spec.name} has {_describe(listed)} by manifest.json and {_describe(tensor)} by "
                        "config.json: copy or export the bundle again."
                    )


def _is_same(tensor: TensorSpec, listed: TensorEntry) -> bool:
    return (tensor.name, tensor.dtype, len(tensor.shape)) == (
        listed.name,
        listed.dtype,
        len(listed.shape),
    ) and all(
        ours == theirs or (isinstance(ours, str) and isinstance(theirs, str))
        for ours, theirs in zip(tensor.shape, listed.shape, strict=True)
    )


def _describe(tensor: TensorSpec | TensorEntry) -> str:
    return quote(f"{tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]")
