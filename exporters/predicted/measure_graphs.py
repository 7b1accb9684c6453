"""Measures the bytes of graphs, so that a bundle's size can be predicted without making it.

    python -m microvlm.exporters.predicted.measure_graphs -o exporters/predicted/graph_bytes.json

A graph's bytes are a skeleton (nodes and names), the functions of its operators, and its weights, inside or as
references to a data file. Skeletons depend on how linears are stored and on a few flags of the configuration, and grow
by the same bytes for each layer. So tiny models of two layers are traced at every width and with every flag, and one of
three layers. Run it again when graphs change; a test compares predictions with real exports.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import onnx

from microvlm.atomic import write_file
from microvlm.config import MemoryConfig, MicroVLMConfig, QuantizationConfig, TextConfig, VisionConfig
from microvlm.console import note, run_click
from microvlm.exporters import contract
from microvlm.exporters.external_data import WeightStore, save_graph
from microvlm.exporters.function_bodies import function
from microvlm.exporters.predicted.graph_bytes import DEPTHS, kinds_of, skeleton_key
from microvlm.exporters.tracing import trace
from microvlm.formats.op_table import OPS
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.lowering import lower, set_traced
from microvlm.model.microvlm import MicroVLM
from microvlm.sizes.weight_bytes import lowered_layers

_TEXT = TextConfig(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    intermediate_size=32, attention_bias=False, max_position_embeddings=64,
)  # fmt: skip
_VIT = VisionConfig(16, 8, 16, 2, 1, 16)
_LITE = VisionConfig(
    image_size=128,
    patch_size=64,
    hidden_size=1280,
    architecture="efficientnet-lite",
    num_classes=4,
    resize="stretch",
)
_TERNARY = QuantizationConfig(decoder_bits=1.58)


def _variants() -> Iterator[tuple[tuple[str, ...], MicroVLMConfig, WeightFormat]]:
    """(graphs that are measured, model, format): every storage of linears and each flag once, and one layer more."""
    plain, ternary = _config(DEPTHS[0]), dataclasses.replace(_config(DEPTHS[0]), quantization=_TERNARY)
    body, others = ("memory_encode", "decoder_model_merged"), ("vision_encoder", "memory_read")
    for bits in (8, 32, 16, 4):
        yield (*body, *(others if bits > 4 else ())), plain, WeightFormat(bits)
    widths: tuple[tuple[float, str], ...]
    widths = ((32, "2bit"), (16, "2bit"), (1.58, "2bit"), (1.58, "base3"))
    for width, packing in widths:
        yield body, ternary, WeightFormat(width, packing)
    for flag in ("attention_bias", "sub_norm"):
        flags: dict[str, Any] = {flag: True}
        text = dataclasses.replace(plain.text, **flags)
        yield body, dataclasses.replace(plain, text=text), WeightFormat(8)
    yield ("memory_write", "memory_forget"), plain, WeightFormat(8)
    for table_bits in (16, 8, 4):
        yield ("embed_tokens", body[1]), plain, WeightFormat(8, embedding_bits=table_bits)
    distilled = dataclasses.replace(plain.vision, distillation_token=True)
    yield others[:1], dataclasses.replace(plain, vision=distilled), WeightFormat(8)
    corrected = dataclasses.replace(plain.memory, readout_size=8)
    yield others[1:], dataclasses.replace(plain, memory=corrected), WeightFormat(8)
    for bits, changes in ((8, {}), (32, {}), (16, {}), (8, {"colours": True}), (8, {"name_pieces": 2})):
        lite = dataclasses.replace(_LITE, **changes)
        yield others[:1], dataclasses.replace(plain, vision=lite, prefix_tokens=0), WeightFormat(bits)
    yield (*body, *others), _config(DEPTHS[1]), WeightFormat(8)


def _config(depth: int) -> MicroVLMConfig:
    """A tiny model with so many layers of everything."""
    return MicroVLMConfig(
        vision=dataclasses.replace(_VIT, num_hidden_layers=depth),
        text=dataclasses.replace(_TEXT, num_hidden_layers=depth),
        memory=MemoryConfig(slots=4, code_size=8, encoder_layers=depth),
        prefix_tokens=2,
    )


def measure() -> dict[str, Any]:
    """The document of graph_bytes.json. Takes minutes."""
    skeletons: dict[str, int] = {}
    for names, config, weights in _variants():
        kinds = kinds_of(lowered_layers(config, {}, weights))
        for spec in contract.graphs(config):
            key = skeleton_key(spec.name, config, kinds)
            if spec.name in names and key not in skeletons:
                skeletons[key] = _skeleton_bytes(config, weights, spec)
                note(f"{key}: {skeletons[key]} bytes")
    functions = {name: _entry_bytes(function(op)) for name, op in OPS.items()}
    return {"skeletons": skeletons, "functions": functions}


def _skeleton_bytes(config: MicroVLMConfig, weights: WeightFormat, spec: contract.GraphSpec) -> int:
    lowered = lower(MicroVLM(config), weights)
    set_traced(lowered, True)
    with tempfile.TemporaryDirectory() as folder:
        proto = save_graph(trace(lowered, spec), spec.name, WeightStore(Path(folder)))
    del proto.functions[:]
    for tensor in proto.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return proto.ByteSize()


def _entry_bytes(proto: onnx.FunctionProto) -> int:
    """Bytes of a function in a model: itself, its field number (two bytes) and its length."""
    return len(proto.SerializeToString()) + 5


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
def command(output: Path) -> None:
    """Trace tiny models at every width and write how many bytes their graphs have."""
    write_file(output, json.dumps(measure(), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    run_click(command)
