"""`microvlm info MODEL` with flags of an export: what the bundle would weigh on disk and in memory. Needs no torch.

Every figure is predicted, from headers, the tokenizer and measured graphs; nothing is exported.
"""

from __future__ import annotations

from typing import Any

from microvlm.escaping import printable
from microvlm.formats.weight_format import WeightFormat
from microvlm.sizes.smaller import Smaller
from microvlm.sources.model_source import find_model


def describe_prediction(model: str, weights: WeightFormat, smaller: Smaller) -> dict[str, Any]:
    """The document of `microvlm info --json` with flags of an export. Raises UserError for what an export refuses."""
    from microvlm.exporters.predicted.bundle_bytes import predict_bundle
    from microvlm.exporters.predicted.memory_bytes import predict_memory

    source = find_model(model, "checkpoint")
    bundle = predict_bundle(source.folder, weights, smaller)
    return {
        "model": source.given,
        "name": bundle.config.name,
        "kind": "prediction",
        "bits": weights.bits,
        "packing": weights.packing,
        "embedding_bits": weights.embedding_bits,
        "vocabulary": bundle.config.text.vocab_size,
        "layers": bundle.config.text.num_hidden_layers,
        "slots": bundle.config.memory.slots,
        "predicted_bundle_bytes": bundle.total_bytes,
        "predicted_file_bytes": bundle.files,
        **predict_memory(bundle)._asdict(),
    }


def format_prediction(document: dict[str, Any]) -> str:
    """The document of `describe_prediction` for people."""
    lines = [
        f"{printable(document['name'])} at {document['bits']:g} bits ({document['packing']}), token table at "
        f"{document['embedding_bits']} bits: {document['vocabulary']:,} tokens, {document['layers']} decoder layers, "
        f"{document['slots']} memory slots",
        "",
        f"{'predicted':<34}{'MB':>10}",
    ]
    files = document["predicted_file_bytes"]
    groups = {
        "weights": sum(size for name, size in files.items() if name.endswith(".data")),
        "graphs": sum(size for name, size in files.items() if name.endswith(".onnx")),
        "other files": sum(size for name, size in files.items() if not name.startswith("onnx/")),
        "bundle": document["predicted_bundle_bytes"],
        "mapped, weights of all graphs": document["predicted_mapped_bytes"],
        "anonymous, graphs of a caption": document["predicted_anonymous_bytes"],
    }
    lines += [f"{name:<34}{size / 1e6:>10.2f}" for name, size in groups.items()]
    return "\n".join(lines)
