"""Memory that a bundle's graphs will take on ONNX Runtime, above that of the interpreter and its libraries.

Mapped bytes are exact: the data files, read from the disk where they lie. Anonymous bytes are those after the graphs of
a caption were opened, before they run: an estimate from what was measured of bundles of 5 to 7 MB, right within a
quarter, and within an eighth where no weight is a float.
"""

from __future__ import annotations

from typing import NamedTuple

from microvlm.exporters.predicted.bundle_bytes import PredictedBundle
from microvlm.formats.lowered_layer import FLOAT_EMBEDDING, HALF, HALF_EMBEDDING
from microvlm.inputs.tokenizer import TOKENIZER
from microvlm.inputs.tokenizer_tables import TABLES

CAPTION_GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
GRAPH_FACTOR = 17
"""Bytes that ONNX Runtime keeps for a byte of a graph without weights: nodes, names, kernels."""
TABLES_BYTES, LIBRARY_BYTES_PER_TOKEN = 340_000, 866
"""Anonymous bytes of a tokenizer that runs by tables, and of one that runs by its library."""


class PredictedMemory(NamedTuple):
    """Bytes above those of the interpreter and of ONNX Runtime."""

    predicted_mapped_bytes: int
    """Data files of all graphs."""
    predicted_anonymous_bytes: int


def predict_memory(bundle: PredictedBundle) -> PredictedMemory:
    """The memory of a bundle that was not made."""
    mapped = sum(size for name, size in bundle.files.items() if name.endswith(".data"))
    graphs = sum(bundle.files[f"onnx/{name}.onnx"] for name in CAPTION_GRAPHS)
    tokenizer = 0
    if TABLES in bundle.files:
        tokenizer = TABLES_BYTES
    elif TOKENIZER in bundle.files:
        tokenizer = LIBRARY_BYTES_PER_TOKEN * bundle.config.text.vocab_size
    return PredictedMemory(mapped, round(GRAPH_FACTOR * graphs) + tokenizer + _copied(bundle))


def _copied(bundle: PredictedBundle) -> int:
    """Bytes of weights that ONNX Runtime copies into a form of its own: float matrices and convolutions."""
    total = 0
    for name, size in bundle.tensors.items():
        owner, _, leaf = name.rpartition(".")
        part = name.partition(".")[0]
        if part in ("vision", "adapter", "decoder", "embedding") and leaf == "weight":
            layer = bundle.layers.get(owner)
            total += size * (1 if layer is None else _COPIES.get(layer.kind, 0))
    return total


_COPIES = {HALF: 4, "dense-float16": 4, "dense-float32": 1, FLOAT_EMBEDDING: 1, HALF_EMBEDDING: 2}
"""Copies of a weight: the packed one, and for halves the float32 that it is made of, both of twice its bytes."""
