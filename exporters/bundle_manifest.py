"""manifest.json: what a bundle holds, by name, shape, bytes and hash, so that a reader can refuse a damaged one.

`bits_per_weight` counts bytes on disk: a linear's packed weights with padding rows, its scales and multipliers, over
its rows times columns. Groups: `ternary`, the linears of the decoder and the memory encoder, whatever their width;
`embedding`, the tied table; `vision`, the vision encoder and the adapter; `other`, everything else (W_M, scope, norms
and biases, the memory's prior and pseudo-inverse).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from microvlm import __version__
from microvlm.exporters import contract
from microvlm.exporters.staging import MANIFEST
from microvlm.formats.op_table import DOMAIN, DOMAIN_VERSION
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.checkpoint import describe_lowered
from microvlm.model.lowering import TERNARY_PARTS
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_runtime import fingerprint_of

FORMAT = 2
MINIMUM_ONNXRUNTIME = "1.25"
GROUPS = ("ternary", "embedding", "vision", "other")


def bits_per_weight(lowered: MicroVLM) -> dict[str, float | None]:
    """Bits a weight really takes on disk, by group."""
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
    facts: dict[str, Any],
) -> None:
    """Write FOLDER/manifest.json over everything else there.

    `facts`: `vocabulary`, how it was cut or None, and `training`, the checkpoint's provenance.
    """
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    document: dict[str, Any] = {
        "format": FORMAT,
        "name": lowered.config.name,
        "fingerprint": fingerprint_of(lowered),
        "bits": weights.bits,
        "packing": weights.packing,
        "embedding_bits": weights.embedding_bits,
        "bits_per_weight": measured_bits,
        "versions": _versions(),
        "graphs": {
            spec.name: {"file": spec.file, **asdict(spec)} for spec in contract.graphs(lowered.config)
        },
        "lowered": describe_lowered(lowered),
        "files": files,
        **facts,
    }
    (folder / MANIFEST).write_text(json.dumps(document, indent=1) + "\n")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, Any]:
    return {
        "microvlm": __version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "opset": contract.OPSET,
        DOMAIN: DOMAIN_VERSION,
        "minimum_onnxruntime": MINIMUM_ONNXRUNTIME,
    }
