"""Export a checkpoint to a bundle: a self-contained folder of graphs, tokenizer and manifest, written atomically."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from safetensors.torch import save

from microvlm.errors import UserError
from microvlm.exporters import contract
from microvlm.exporters.bundle_manifest import bits_per_weight, write_manifest
from microvlm.exporters.bundle_readme import write_readme
from microvlm.exporters.elsewhere.genai_files import GRAPHS, write_genai_files
from microvlm.exporters.elsewhere.transformers_files import write_transformers_files
from microvlm.exporters.external_data import WeightStore, save_graph
from microvlm.exporters.graph_check import Check, check_graph
from microvlm.exporters.lowerings.lowered_check import check_lowered, versions_of
from microvlm.exporters.lowerings.product_nodes import replace_products
from microvlm.exporters.model_card import copy_card
from microvlm.exporters.smaller.cutting import Cut, cut_model
from microvlm.exporters.staging import staged
from microvlm.exporters.tracing import trace
from microvlm.exporters.vocabulary.shrink import SmallerVocabulary
from microvlm.exporters.vocabulary.table_builder import write_tables
from microvlm.formats import documents
from microvlm.formats.layer_table import products_of
from microvlm.formats.manifest import MEMORY_PRIOR
from microvlm.formats.weight_format import WeightFormat
from microvlm.inputs.processor_files import check_documents, read_documents
from microvlm.inputs.tokenizer_tables import TOKENIZER
from microvlm.model.checkpoint import PROCESSOR_FILES, describe_lowered, load_checkpoint, resolve_checkpoint
from microvlm.model.lowering import lower, set_traced, ternary_trained
from microvlm.model.microvlm import MicroVLM
from microvlm.sizes.smaller import Smaller

MAX_PROVENANCE_BYTES, MAX_PROVENANCE_DEPTH = 4_000_000, 50
"""Of a checkpoint's training.json, which becomes a part of the manifest."""
Log = Callable[[str], None]


class CheckFailed(Exception):
    """A saved graph does not compute what the model computes. `report` has the outputs; the bundle was not kept."""

    def __init__(self, report: ExportReport):
        super().__init__("a graph differs from the model")
        self.report = report


@dataclass
class ExportReport:
    """Sizes of an exported bundle, and its graphs compared with PyTorch.

    `bits_per_weight` counts bytes on disk, of our own operators' weights.
    """

    bundle: str
    bits: float
    packing: str
    total_bytes: int = 0
    ternary_nodes: int = 0
    bits_per_weight: dict[str, float | None] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    """What was left out, what it saves and what it costs."""
    notes: list[str] = field(default_factory=list)
    products: dict[str, int] = field(default_factory=dict)
    """How many products became which operators of another lowering than ours."""

    def to_json(self) -> dict[str, Any]:
        """The document of `microvlm-export --json`. A difference that is not finite is null."""
        checks = [
            {
                "graph": check.graph,
                "output": check.output,
                "passed": check.passed,
                "max_abs_diff": check.max_abs_diff if check.max_abs_diff < float("inf") else None,
            }
            for check in self.checks
        ]
        return {**vars(self), "checks": checks, "cuts": [cut.to_json() for cut in self.cuts]}


def export(
    source: str | os.PathLike[str],
    output: Path,
    weights: WeightFormat,
    *,
    smaller: Smaller | None = None,
    force: bool = False,
    genai: bool = False,
    threads: int = 0,
    log: Log = lambda line: None,
    doing: Log = lambda line: None,
) -> ExportReport:
    """Export the checkpoint `source` (a directory, hub id or bundled name) to the folder `output`.

    `output` appears, or with `force` replaces an older bundle, when all graphs were checked. `smaller` says what is
    left out of the model, None for nothing; with `genai` the bundle also has what onnxruntime-genai and optimum's
    ORTModelForCausalLM load (`elsewhere.genai_files`); `threads` are ONNX Runtime's in the checks, 0 for the usable
    cores; `log` is called with a line for what is done, `doing` with one for what takes seconds from now on.

    Raises UserError for bad input, an output that may not be replaced or a full disk, and CheckFailed when ONNX
    Runtime's outputs differ from the model's.
    """
    directory = resolve_checkpoint(source)
    if genai and not (directory / TOKENIZER).is_file():
        raise UserError(
            f"{source} has no {TOKENIZER}, which --genai needs: leave --genai out, or add the file."
        )
    provenance = _provenance(directory / "training.json")
    report = ExportReport(bundle=str(output), bits=weights.bits, packing=weights.packing)
    with staged(output, force) as stage:
        doing(f"loading {directory.name}")
        model = load_checkpoint(directory)
        check_documents(read_documents(directory), model.config, directory)
        report.notes += _remarks(model, weights)
        cut = cut_model(model, directory, smaller or Smaller(), weights, log)
        report.cuts = cut.cuts
        lowered = lower(cut.model, weights)
        vocabulary = cut.vocabulary
        del model, cut
        stage.require_space(sum(t.numel() * t.element_size() for t in lowered.state_dict().values()))
        for remark in report.notes:
            log(remark)
        graphs = _write_graphs(lowered, stage.path, report, weights.lowering, threads, log, doing)
        doing("writing the bundle")
        if not all(check.passed for check in report.checks):
            raise CheckFailed(report)
        lowered.config.save(stage.path)
        _save_prior(lowered, stage.path)
        _copy_processor(directory, stage.path, vocabulary, report, log)
        if (stage.path / TOKENIZER).is_file():
            write_transformers_files(stage.path, lowered.config)
        if genai:
            report.checks += write_genai_files(stage.path, graphs, threads)
            if not all(check.passed for check in report.checks):
                raise CheckFailed(report)
        copy_card(directory, stage.path)
        if weights.lowering == "custom":
            report.bits_per_weight = bits_per_weight(lowered)
        vocabulary_cut = vocabulary.describe() if vocabulary else None
        write_readme(stage.path, lowered.config, weights)
        versions = versions_of(stage.path, weights.lowering)
        write_manifest(
            stage.path, lowered, weights, report.bits_per_weight, vocabulary_cut, provenance, versions
        )
        report.total_bytes = sum(path.stat().st_size for path in stage.path.rglob("*") if path.is_file())
    return report


def _remarks(model: MicroVLM, weights: WeightFormat) -> list[str]:
    ternary = ternary_trained(model)
    if weights.bits == 1.58 and not ternary:
        return [
            "WARNING: this checkpoint was not trained for 1.58 bits; rounding its decoder to ternary destroys it. "
            "Export it at --bits 8, or train it with microvlm-train first."
        ]
    if weights.bits != 1.58 and ternary:
        return [
            f"This checkpoint is ternary: its trits are stored at {weights.bits:g} bits each, "
            "which changes their size and not what the model computes."
        ]
    return []


def _write_graphs(
    lowered: MicroVLM, folder: Path, report: ExportReport, lowering: str, threads: int, log: Log, doing: Log
) -> dict[str, onnx.ModelProto]:
    """Write and check every graph -> those that `write_genai_files` takes, by name."""
    onnx_folder = folder / "onnx"
    onnx_folder.mkdir()
    store = WeightStore(onnx_folder)
    weights_in_graphs = {"memory_prior"}
    kept = {}
    columns = {name: layer.columns for name, layer in describe_lowered(lowered).items()}
    specs = list(contract.graphs(lowered.config))
    for number, spec in enumerate(specs, 1):
        doing(f"graph {number} of {len(specs)}: {spec.name}")
        began = time.perf_counter()
        set_traced(lowered, True)
        graph = trace(lowered, spec, fuses=lowering == "custom")
        if lowering != "custom":
            for product, count in replace_products(graph, lowering, columns).items():
                report.products[product] = report.products.get(product, 0) + count
        proto = save_graph(graph, spec.name, store)
        weights_in_graphs |= {tensor.name for tensor in proto.graph.initializer}
        if spec.name in GRAPHS:
            kept[spec.name] = proto
        ops = Counter(node.op_type for node in proto.graph.node)
        report.ternary_nodes += sum(count * products_of(name) for name, count in ops.items())
        seconds = time.perf_counter() - began
        check = check_graph if lowering == "custom" else check_lowered
        checks, remark = check(lowered, spec, folder / spec.file, threads)
        report.checks += checks
        log(f"{spec.name}: {len(proto.graph.node)} nodes in {seconds:.1f} s, checked against PyTorch")
        if remark:
            report.notes.append(remark)
            log(remark)
    # A backend rebuilds the model from the graphs' weights, so each weight must be in a graph under its own name.
    if lowering == "custom" and weights_in_graphs != set(lowered.state_dict()):
        raise RuntimeError(
            f"weights and graphs differ in {sorted(weights_in_graphs ^ set(lowered.state_dict()))[:5]}"
        )
    return kept


def _copy_processor(
    source: Path, folder: Path, smaller: SmallerVocabulary | None, report: ExportReport, log: Log
) -> None:
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
    for name, document in (smaller.documents if smaller else {}).items():
        (folder / name).write_text(document)
    if not (source / TOKENIZER).is_file():
        report.notes.append(f"The checkpoint has no {TOKENIZER}: the bundle runs graphs, and reads no text.")
        log(report.notes[-1])
        return
    reason = write_tables(folder / TOKENIZER, folder)
    if reason:
        report.notes.append(f"The tokenizer runs by its library, in more memory than by tables: {reason}.")
        log(report.notes[-1])


def _provenance(path: Path) -> dict[str, Any] | None:
    """The checkpoint's training.json, None if it has none. Nothing reads it but people. Raises UserError."""
    remedy = "copy the checkpoint again, or remove the file"
    try:
        document = documents.load(path, dict[str, Any], remedy, limit=MAX_PROVENANCE_BYTES)
    except FileNotFoundError:
        return None
    if documents.depth_of(document) > MAX_PROVENANCE_DEPTH:
        raise UserError(f"{path} is nested too deeply: {remedy}.")
    return document


def _save_prior(lowered: MicroVLM, folder: Path) -> None:
    """Write the empty memory's mean, float32 [K, C]. Not by `save_file`, whose files only their owner can read."""
    path = folder / f"{MEMORY_PRIOR}.safetensors"
    path.write_bytes(save({MEMORY_PRIOR: lowered.memory_prior.detach().contiguous()}))
