"""Finds the path of every product: the graph that ONNX Runtime makes of a bundle's file, and the profile of one run.

A session optimises its graph, and may replace what is written by something else, or not: DequantizeLinear and MatMul by
MatMulNBits, a function by its kernel or by its body, weights by floats that it computes when it loads. It is asked to
save that graph (`optimized_model_filepath`), and nodes of both are found by the weights that they read.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from microvlm.backends import resolve_bundle
from microvlm.backends.ort import OrtRuntime
from microvlm.bench.provenance import describe_model, provenance
from microvlm.errors import UserError
from microvlm.formats.manifest import GraphEntry, Manifest
from microvlm.formats.op_table import DOMAIN, MATMUL_BY_KIND, OPS

if TYPE_CHECKING:
    import onnx

Progress = Callable[[str], None]
_SIZES = {"batch": 1, "sequence": 2, "past": 1, "past + sequence": 3}
_INLINED, _FOLDED = "ONNX operators of its function", "a constant, computed at load"


class _Path(NamedTuple):
    graph: str
    written: str
    runs_as: str
    provider: str
    bits: float | None
    block: int | None
    accuracy_level: int | None
    columns: int
    rows: int


def run(
    models: Sequence[str], native: bool | None = None, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """The document of `microvlm-bench paths`. `native`: see `OrtBackend.load`. Raises UserError."""
    folders = [resolve_bundle(model) for model in models]
    bundles = [_bundle(folder, native, progress) for folder in folders]
    return {
        "report": "paths",
        "bundles": bundles,
        "provenance": provenance(describe_model(folders[0]), 1),
    }


def _bundle(folder: Path, native: bool | None, progress: Progress) -> dict[str, Any]:
    import onnx

    runtime = OrtRuntime(folder, threads=1, native=native)
    manifest, models, paths = runtime.files.manifest, [], Counter[_Path]()
    for graph in runtime.graphs:
        progress(f"{folder.name}: {graph}")
        written = onnx.load(str(runtime.graph_path(graph)), load_external_data=False)
        models.append(written)
        optimized, providers = _optimized(runtime, graph, manifest.graphs[graph])
        paths.update(_paths(graph, manifest, written.graph, optimized.graph, providers))
    if not paths:
        raise UserError(f"{folder} has no quantised product: it was exported at --bits 16 or 32.")
    return {
        "name": folder.name,
        "bits": manifest.bits,
        "embedding_bits": manifest.embedding_bits,
        "lowering": manifest.lowering,
        "kernels": runtime.kernels,
        "total_bytes": sum(entry.bytes for entry in manifest.files.values()),
        "opset": max(each.version for model in models for each in model.opset_import if not each.domain),
        "ir": max(model.ir_version for model in models),
        "products": [
            {**path._asdict(), "is_replaced": path.runs_as != path.written, "count": count}
            for path, count in paths.items()
        ],
    }


def _optimized(
    runtime: OrtRuntime, graph: str, entry: GraphEntry
) -> tuple[onnx.ModelProto, dict[str, set[str]]]:
    """(The graph that a session makes of a bundle's, the providers that ran it by names of nodes and of types.)"""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options, saved = runtime.session_options(), Path(folder, "optimized.onnx")
        options.optimized_model_filepath = str(saved)
        # Weights beside it: a protobuf has at most 2 GB.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder, "profile"))
        session = onnxruntime.InferenceSession(
            str(runtime.graph_path(graph)), options, providers=["CPUExecutionProvider"]
        )
        session.run(None, _feeds(entry))
        events = json.loads(Path(session.end_profiling()).read_text())
        model = onnx.load(str(saved), load_external_data=False)
    providers: dict[str, set[str]] = {}
    for event in events:
        facts = event.get("args", {})
        if event.get("cat") == "Node" and facts.get("provider"):
            for name in (event["name"].removesuffix("_kernel_time"), f"type {facts['op_name']}"):
                providers.setdefault(name, set()).add(facts["provider"])
    return model, providers


def _feeds(entry: GraphEntry) -> dict[str, np.ndarray]:
    """Two tokens, or a picture: what a run computes is not looked at."""
    feeds = {}
    for tensor in entry.inputs:
        shape = [size if isinstance(size, int) else _SIZES.get(size, 1) for size in tensor.shape]
        feeds[tensor.name] = np.ones(shape, tensor.dtype)
    return feeds


def _paths(
    graph: str,
    manifest: Manifest,
    written: onnx.GraphProto,
    optimized: onnx.GraphProto,
    providers: dict[str, set[str]],
) -> Iterable[_Path]:
    """The path of each product of a graph, layer by layer."""
    read_by, run_by = _readers(written, manifest), _readers(optimized, manifest)
    for layer, nodes in read_by.items():
        if _is_lookup(nodes[0]):
            continue
        runs = run_by.get(layer, [])
        if not runs and _is_constant(nodes[-1], written, optimized):
            yield _Path(graph, _names(nodes), _FOLDED, "none", None, None, None, *_sizes(manifest, layer))
            continue
        if not runs:
            raise UserError(
                f"ONNX Runtime's {graph} has no node that reads {layer}: this version hides its path."
            )
        entry, last, attributes = manifest.lowered[layer], runs[-1], _integers(runs[-1])
        is_own = last.domain == DOMAIN
        inlined = nodes[0].domain == DOMAIN and not is_own
        yield _Path(
            graph,
            _names(nodes),
            _INLINED if inlined else _names(runs),
            ", ".join(
                sorted(providers.get(last.name) or providers.get(f"type {last.op_type}") or {"not run"})
            ),
            MATMUL_BY_KIND[entry.kind].bits_per_weight if is_own else attributes.get("bits"),
            attributes.get("block_size") or _group(entry.kind, is_own),
            attributes.get("accuracy_level"),
            *_sizes(manifest, layer),
        )


def _names(nodes: Sequence[onnx.NodeProto]) -> str:
    return " + ".join(dict.fromkeys(node.op_type for node in nodes))


def _sizes(manifest: Manifest, layer: str) -> tuple[int, int]:
    """(K, N) of a layer."""
    return manifest.lowered[layer].columns, manifest.lowered[layer].rows


def _is_constant(node: onnx.NodeProto, written: onnx.GraphProto, optimized: onnx.GraphProto) -> bool:
    """Whether what follows from a node, of constants alone, was computed when the session was made."""
    constants = {tensor.name for tensor in optimized.initializer}
    names, fresh = set(node.output), set(node.output)
    while fresh:
        users = [user for user in written.node if fresh & set(user.input)]
        fresh = {name for user in users for name in user.output} - names
        names |= fresh
    return bool(names & constants)


def _readers(graph: onnx.GraphProto, manifest: Manifest) -> dict[str, list[onnx.NodeProto]]:
    """Quantised layer -> the nodes that read its weights, and the product behind a DequantizeLinear."""
    layers = [name for name, layer in manifest.lowered.items() if layer.kind in MATMUL_BY_KIND]
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    by_layer: dict[str, list[onnx.NodeProto]] = {}
    for name in users:
        layer, _, leaf = name.rpartition(".")
        if layer not in layers or leaf == "bias":
            continue
        for node in users[name]:
            chain = [node]
            if node.op_type == "DequantizeLinear":
                chain += users.get(node.output[0], [])
            known = by_layer.setdefault(layer, [])
            known += [each for each in chain if not any(each is other for other in known)]
    return by_layer


def _is_lookup(node: onnx.NodeProto) -> bool:
    return node.op_type in OPS and OPS[node.op_type].is_lookup


def _group(kind: str, is_own: bool) -> int | None:
    group = MATMUL_BY_KIND[kind].group
    return group if is_own and group > 1 else None


def _integers(node: onnx.NodeProto) -> dict[str, int]:
    return {each.name: each.i for each in node.attribute if each.type == each.INT}
