"""Describe an exported bundle: its manifest, and the bits that a weight takes on disk.

`bits_per_weight` divides the bits on disk of a linear (packed weights with padding rows, scales, multipliers) by its
rows times columns. Groups: `ternary`, the linears of the decoder and the memory encoder, whatever their width;
`embedding`, the tied table; `vision`, the vision encoder and the adapter; `other`, everything else (W_M, scope, norms
and biases, the memory's prior and pseudo-inverse).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from microvlm import __version__
from microvlm.exporters import contract
from microvlm.formats.manifest import (
    BUNDLE_FORMAT,
    GraphEntry,
    Manifest,
    TensorEntry,
    list_files,
    save_manifest,
)
from microvlm.formats.op_table import DOMAIN, DOMAIN_VERSION
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.checkpoint import describe_lowered
from microvlm.model.lowering import TERNARY_PARTS
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_runtime import fingerprint_of

MINIMUM_ONNXRUNTIME = "1.25"
GROUPS = ("ternary", "embedding", "vision", "other")


def bits_per_weight(lowered: MicroVLM) -> dict[str, float | None]:
    """Bits that a weight of `lowered` takes on disk, by group; None for a group without weights."""
    stored, weights = dict.fromkeys(GROUPS, 0), dict.fromkeys(GROUPS, 0)
    linears = {name: module for name, module in lowered.named_modules() if _is_linear(module)}
    for key, tensor in lowered.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        part = key.partition(".")[0]
        is_weight = owner in linears and leaf != "bias"
        if part in ("vision", "adapter"):
            group = "vision"
        elif part == "embedding":
            group = "embedding"
        else:
            group = "ternary" if part in TERNARY_PARTS and is_weight else "other"
        stored[group] += 8 * tensor.numel() * tensor.element_size()
        if not is_weight:
            weights[group] += tensor.numel()
        elif leaf in ("packed", "weight"):
            weights[group] += _size(linears[owner])
    return {group: round(stored[group] / weights[group], 4) if weights[group] else None for group in GROUPS}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "rows")


def _size(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    return module.rows * module.columns  # type: ignore[operator,return-value]


def write_manifest(
    folder: Path,
    lowered: MicroVLM,
    weights: WeightFormat,
    measured_bits: dict[str, float | None],
    vocabulary: dict[str, Any] | None,
    training: Any,
    versions: dict[str, Any] | None = None,
) -> None:
    """Write FOLDER/manifest.json, which lists all files that are in FOLDER by then. Raises OSError.

    `vocabulary` says how the vocabulary was cut, None if it was not; `training` is the checkpoint's training.json;
    `versions` replaces what is usual of opsets and libraries.
    """
    graphs = {
        spec.name: GraphEntry(
            spec.file, spec.name, spec.method, _tensor_entries(spec.inputs), _tensor_entries(spec.outputs)
        )
        for spec in contract.graphs(lowered.config)
    }
    manifest = Manifest(
        format=BUNDLE_FORMAT,
        name=lowered.config.name,
        fingerprint=fingerprint_of(lowered),
        bits=weights.bits,
        packing=weights.packing,
        embedding_bits=weights.embedding_bits,
        lowering=weights.lowering,
        bits_per_weight=measured_bits,
        versions={**_versions(), **(versions or {})},
        graphs=graphs,
        lowered=describe_lowered(lowered),
        files=list_files(folder),
        vocabulary=vocabulary,
        training=training,
    )
    save_manifest(folder, manifest)


def _tensor_entries(specs: Sequence[contract.TensorSpec]) -> tuple[TensorEntry, ...]:
    return tuple(TensorEntry(spec.name, spec.dtype, spec.shape) for spec in specs)


def _versions() -> dict[str, Any]:
    return {
        "microvlm": __version__,
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "opset": contract.OPSET,
        DOMAIN: DOMAIN_VERSION,
        "minimum_onnxruntime": MINIMUM_ONNXRUNTIME,
    }
