"""Bytes of a bundle's graphs and data files, from measured skeletons of graphs (`measure_graphs`)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from microvlm.config import MicroVLMConfig
from microvlm.exporters import contract
from microvlm.formats import documents
from microvlm.formats.lowered_layer import LoweredLayer
from microvlm.formats.op_table import LOOKUP_BY_KIND, MATMUL_BY_KIND
from microvlm.sizes.weight_bytes import TERNARY_PARTS

TABLE = Path(__file__).with_name("graph_bytes.json")
DEPTHS = (2, 3)
"""Layers of the models that were measured: their difference is one layer's."""
INLINE_BELOW, ALIGNMENT, PAGE_ABOVE, PAGE = 1024, 64, 1 << 20, 4096
"""Bytes of tensors that stay in the graph, and multiples where others begin in a data file (`external_data`)."""
SHARED = "embedding."
"""Tensors of this prefix are stored once for the lookup and the head."""
_PLAIN = "float"
_PARTS = {
    "vision_encoder": ("vision", "adapter"),
    "embed_tokens": ("embedding",),
    "memory_encode": ("memory_encoder",),
    "memory_write": (),
    "memory_forget": (),
    "memory_read": ("scope", "memory_projection"),
    "decoder_model_merged": ("decoder", "embedding"),
}
_ALSO_READ = {"memory_read": ("memory_encoder.pseudo_inverse",)}


class Kinds(NamedTuple):
    """How linears are stored: those of decoder and memory encoder, the others, and the token table."""

    body: str
    other: str
    table: str


class FileBytes(NamedTuple):
    """Predicted bytes of files below onnx/, by name."""

    graphs: dict[str, int]
    data: dict[str, int]


def kinds_of(layers: Mapping[str, LoweredLayer]) -> Kinds:
    """The storage of the parts of a model whose lowered layers these are."""
    body = [layer.kind for name, layer in layers.items() if name.partition(".")[0] in TERNARY_PARTS]
    other = [
        layer.kind
        for name, layer in layers.items()
        if name.partition(".")[0] not in (*TERNARY_PARTS, "embedding")
    ]
    table = [layer.kind for name, layer in layers.items() if name.startswith("embedding")]
    return Kinds(*(kinds[0] if kinds else _PLAIN for kinds in (body, other, table)))


def skeleton_key(graph: str, config: MicroVLMConfig, kinds: Kinds) -> str:
    """The name of a graph's skeleton in the table: what its bytes depend on, its depth included."""
    vision, text, memory = config.vision, config.text, config.memory
    flags = [name for name in ("attention_bias", "sub_norm") if getattr(text, name)]
    if graph == "decoder_model_merged":
        parts = [kinds.body, f"table={kinds.table}", *flags, str(text.num_hidden_layers)]
    elif graph == "memory_encode":
        parts = [kinds.body, *flags, str(memory.encoder_layers)]
    elif graph == "memory_read":
        parts = [kinds.other, *(["readout"] if memory.readout_size else []), str(text.num_hidden_layers)]
    elif graph == "embed_tokens":
        parts = [kinds.table]
    elif graph == "vision_encoder" and vision.is_convolutional:
        marks = [name for name in ("colours", "name_pieces") if getattr(vision, name)]
        parts = [kinds.other, "efficientnet-lite", *marks]
    elif graph == "vision_encoder":
        marks = ["distilled"] if vision.distillation_token else []
        parts = [kinds.other, *marks, str(vision.num_hidden_layers)]
    else:
        parts = []
    return " ".join([graph, *parts])


def onnx_bytes(
    config: MicroVLMConfig, layers: Mapping[str, LoweredLayer], tensors: Mapping[str, int]
) -> FileBytes:
    """Bytes of every graph and data file of a model whose `layers` are lowered and whose `tensors` have these bytes."""
    kinds = kinds_of(layers)
    graphs, data = {}, {}
    for spec in contract.graphs(config):
        names = [name for name in tensors if _is_in(name, spec.name)]
        graphs[f"{spec.name}.onnx"] = _skeleton(spec.name, config, kinds) + sum(
            _stored_in_graph(name, tensors[name], spec.name) for name in names
        )
        graphs[f"{spec.name}.onnx"] += _functions(spec.name, layers)
        for file in {_file_of(name, spec.name) for name in names if tensors[name] >= INLINE_BELOW}:
            data[file] = _data_bytes(
                tensors[n] for n in names if tensors[n] >= INLINE_BELOW and _file_of(n, spec.name) == file
            )
    return FileBytes(graphs, data)


def _is_in(name: str, graph: str) -> bool:
    return name.partition(".")[0] in _PARTS[graph] or name in _ALSO_READ.get(graph, ())


def _file_of(name: str, graph: str) -> str:
    return "embedding.data" if name.startswith(SHARED) else f"{graph}.data"


def _data_bytes(sizes: Iterable[int]) -> int:
    """Where the last of tensors of these sizes ends, each at its alignment."""
    end = 0
    for size in sizes:
        alignment = PAGE if size > PAGE_ABOVE else ALIGNMENT
        end = -(-end // alignment) * alignment + size
    return end


def _stored_in_graph(name: str, nbytes: int, graph: str) -> int:
    """What a weight adds to its skeleton: its bytes, or where they are."""
    if nbytes < INLINE_BELOW:
        return nbytes + (3 if nbytes > 127 else 2)
    location = len(_file_of(name, graph))
    # data_location; location, offset and length as pairs of strings, each with tags and lengths.
    return 2 + (6 + 8 + location) + (6 + 6 + 8) + (6 + 6 + len(str(nbytes)))


def _functions(graph: str, layers: Mapping[str, LoweredLayer]) -> int:
    """Bytes of the functions of the operators that a graph calls."""
    names = set()
    for name, layer in layers.items():
        if _is_in(name, graph) and layer.kind in MATMUL_BY_KIND:
            is_lookup = graph == "embed_tokens"
            names.add((LOOKUP_BY_KIND if is_lookup else MATMUL_BY_KIND)[layer.kind].name)
    return sum(_table()["functions"][name] for name in names)


def _skeleton(graph: str, config: MicroVLMConfig, kinds: Kinds) -> int:
    """Bytes of a skeleton: a measured one, or put together from measured ones by layers and flags.

    Beside the graph of the reference storage, what another storage, table or flag adds was measured at two layers. The
    first and the last grow with the layers.
    """
    table = _table()["skeletons"]
    key = skeleton_key(graph, config, kinds)
    if key in table:
        return table[key]
    words = key.split(" ")
    depth = int(words.pop()) if words[-1].isdigit() else None
    flags = [word for word in words if word in _FLAGS]
    reference = [graph, _REFERENCE, *(word for word in words[2:] if word not in _FLAGS)]
    heads = [word for word in reference if word.startswith("table=")]
    if heads:
        reference[reference.index(heads[0])] = f"table={_REFERENCE}"
    measured = table[_name(reference, depth)]

    def added(changed: list[str]) -> int:
        return table[_name(changed, depth)] - measured

    growing = added([graph, words[1], *reference[2:]])
    growing += sum(added([*reference, flag]) for flag in flags if flag in _GROWING)
    fixed = sum(added([*reference, flag]) for flag in flags if flag not in _GROWING)
    fixed += sum(added([graph, _REFERENCE, head]) for head in heads)
    if depth is None:
        return measured + growing + fixed
    layer = table[f"{' '.join(reference)} {DEPTHS[1]}"] - measured
    return measured + (depth - DEPTHS[0]) * layer + growing * depth // DEPTHS[0] + fixed


def _name(words: list[str], depth: int | None) -> str:
    return " ".join([*words, *([] if depth is None else [str(DEPTHS[0])])])


_REFERENCE = "int8"
"""The storage that flags, tables and a further layer were measured at."""
_GROWING = ("attention_bias", "sub_norm")
"""Flags of every layer."""
_FLAGS = (*_GROWING, "readout", "distilled", "colours", "name_pieces")


@functools.cache
def _table() -> dict[str, dict[str, int]]:
    return documents.load(TABLE, dict[str, dict[str, int]], "install microvlm again")
