"""The size of a bundle before it is exported: every file, from a checkpoint's headers and the flags of the export."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from microvlm.config import CONFIG, MicroVLMConfig
from microvlm.errors import UserError
from microvlm.exporters import contract
from microvlm.exporters.elsewhere.transformers_files import write_transformers_files
from microvlm.exporters.model_card import MODEL_CARD
from microvlm.exporters.predicted.graph_bytes import onnx_bytes
from microvlm.exporters.vocabulary.shrink import SmallerVocabulary, shrink
from microvlm.exporters.vocabulary.table_builder import write_tables
from microvlm.formats import documents
from microvlm.formats.bundle import TRANSFORMERS_MODULE
from microvlm.formats.lowered_layer import LoweredLayer
from microvlm.formats.manifest import (
    EXAMPLE,
    MANIFEST,
    MEMORY_PRIOR,
    README,
    FileEntry,
    GraphEntry,
    Manifest,
    TensorEntry,
    manifest_text,
)
from microvlm.formats.op_table import MATMUL_BY_KIND
from microvlm.formats.stored_tensors import read_checkpoint
from microvlm.formats.weight_format import WeightFormat
from microvlm.inputs.processor import GENERATION, PREPROCESSOR, TOKENIZER, TOKENIZER_CONFIG
from microvlm.inputs.tokenizer_tables import TABLES
from microvlm.sizes.smaller import Smaller, with_vocabulary
from microvlm.sizes.weight_bytes import lowered_layers, tensor_bytes
from microvlm.sources.model_source import WEIGHTS

_README_BYTES = 5_350
"""The page of a bundle is text of this length; numbers in it change it by less than a hundred bytes."""
_HASH = "0" * 64
_SAFETENSORS_HEADER = 88
"""Bytes before the numbers of a file with one tensor of two dimensions."""


class PredictedBundle(NamedTuple):
    """A bundle that was not made."""

    config: MicroVLMConfig
    layers: Mapping[str, LoweredLayer]
    tensors: Mapping[str, int]
    """Bytes of every weight, by name."""
    files: dict[str, int]
    """Bytes of every file, by its path in the bundle."""

    @property
    def total_bytes(self) -> int:
        return sum(self.files.values())


def predict_bundle(checkpoint: Path, weights: WeightFormat, smaller: Smaller) -> PredictedBundle:
    """The bundle that `microvlm-export` makes of the folder `checkpoint` with these flags.

    Reads headers and the tokenizer, no weights. Raises UserError for what an export refuses too.
    """
    config = smaller.sizes_of(MicroVLMConfig.load(checkpoint))
    _, stored = read_checkpoint(checkpoint / WEIGHTS, MicroVLMConfig.load(checkpoint))
    vocabulary = shrink(checkpoint, config, smaller) if smaller.cuts_tokens else None
    if vocabulary is not None:
        config = with_vocabulary(config, len(vocabulary.old_ids))
    kept = {name: layer for name, layer in stored.items() if _is_kept(name, config)}
    layers = lowered_layers(config, kept, weights)
    _refuse_repacking(layers, weights)
    tensors = tensor_bytes(config, layers)
    found = onnx_bytes(config, layers, tensors)
    files = {f"onnx/{name}": size for name, size in {**found.graphs, **found.data}.items()}
    files |= _other_files(checkpoint, config, vocabulary)
    files[MANIFEST] = _manifest_bytes(checkpoint, config, layers, weights, files, vocabulary)
    return PredictedBundle(config, layers, tensors, dict(sorted(files.items())))


def _is_kept(name: str, config: MicroVLMConfig) -> bool:
    """Whether a smaller model has this layer. Which layers went makes no difference to sizes."""
    parts = name.split(".")
    return parts[:2] != ["decoder", "layers"] or int(parts[2]) < config.text.num_hidden_layers


def _refuse_repacking(layers: Mapping[str, LoweredLayer], weights: WeightFormat) -> None:
    kind = next((layer.kind for name, layer in layers.items() if name.startswith("decoder.")), None)
    op = MATMUL_BY_KIND.get(kind or "")
    if op is not None and not op.is_ternary and op.bits != weights.bits:
        raise UserError(
            f"this decoder is already stored as {kind}, which --bits {weights.bits:g} cannot be made from: "
            "give the checkpoint it was made from."
        )


def _other_files(
    checkpoint: Path, config: MicroVLMConfig, vocabulary: SmallerVocabulary | None
) -> dict[str, int]:
    """Everything but the graphs and the manifest."""
    memory = config.memory
    files = {
        README: _README_BYTES,
        CONFIG: len(json.dumps(config.to_dict(), indent=2)) + 1,
        f"{MEMORY_PRIOR}.safetensors": 4 * memory.slots * memory.code_size + _SAFETENSORS_HEADER,
    }
    changed = vocabulary.documents if vocabulary is not None else {}
    for name in (TOKENIZER, TOKENIZER_CONFIG, PREPROCESSOR, GENERATION, MODEL_CARD):
        if name in changed:
            files[name] = len(changed[name].encode())
        elif (checkpoint / name).is_file():
            files[name] = (checkpoint / name).stat().st_size
    if TOKENIZER in files:
        files[EXAMPLE] = Path(contract.__file__).with_name("elsewhere").joinpath("example.py").stat().st_size
        with tempfile.TemporaryDirectory() as folder:
            for name in (TOKENIZER, TOKENIZER_CONFIG, PREPROCESSOR, GENERATION):
                if name in files:
                    text = changed[name].encode() if name in changed else (checkpoint / name).read_bytes()
                    (Path(folder) / name).write_bytes(text)
            write_transformers_files(Path(folder), config)
            for name in (CONFIG, PREPROCESSOR, TRANSFORMERS_MODULE):
                files[name] = (Path(folder) / name).stat().st_size
            source = Path(folder) / TOKENIZER
            if write_tables(source, Path(folder)) is None:
                files[TABLES] = (Path(folder) / TABLES).stat().st_size
    return files


def _manifest_bytes(
    checkpoint: Path,
    config: MicroVLMConfig,
    layers: Mapping[str, LoweredLayer],
    weights: WeightFormat,
    files: Mapping[str, int],
    vocabulary: SmallerVocabulary | None,
) -> int:
    """Bytes of manifest.json: the document with numbers that have as many digits as the real ones."""
    graphs = {
        spec.name: GraphEntry(
            spec.file,
            spec.name,
            spec.method,
            tuple(TensorEntry(t.name, t.dtype, t.shape) for t in spec.inputs),
            tuple(TensorEntry(t.name, t.dtype, t.shape) for t in spec.outputs),
        )
        for spec in contract.graphs(config)
    }
    manifest = Manifest(
        format=2,
        name=config.name,
        fingerprint=_HASH,
        bits=weights.bits,
        packing=weights.packing,
        embedding_bits=weights.embedding_bits,
        bits_per_weight=dict.fromkeys(("ternary", "embedding", "vision", "other"), 10.1234),
        versions={"microvlm": "0.1.0", "torch": "2.13.0+cpu", "onnx": "1.23.2", "opset": contract.OPSET},
        graphs=graphs,
        lowered=dict(layers),
        files={name: FileEntry(size, _HASH) for name, size in files.items()},
        vocabulary=vocabulary.describe() if vocabulary is not None else None,
        training=_training(checkpoint),
    )
    return len(manifest_text(manifest))


def _training(checkpoint: Path) -> dict[str, Any] | None:
    try:
        return documents.load(checkpoint / "training.json", dict[str, Any], "copy the checkpoint again")
    except FileNotFoundError:
        return None
