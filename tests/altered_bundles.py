"""Copies of a bundle that were broken on purpose, and the verdict on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx

from microvlm.backends import load
from microvlm.bench.equivalence.compare import ModelUnderTest, Pair, compare
from microvlm.bench.equivalence.metrics import Metrics
from microvlm.bench.equivalence.samples import choose, longest_episode
from microvlm.bench.equivalence.verdict import judge
from microvlm.bench.evalset_reader import load_evalset
from microvlm.formats.manifest import sha256
from microvlm.inputs.processor import Processor


def altered(bundle: Path, folder: Path, graph: str, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of `bundle` with one graph changed and a manifest that agrees with it."""
    copy = folder / "altered"
    shutil.copytree(bundle, copy)
    path = copy / "onnx" / f"{graph}.onnx"
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    mend_manifest(copy)
    return copy


def mend_manifest(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        entry["bytes"], entry["sha256"] = (bundle / name).stat().st_size, sha256(bundle / name)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def matmul_of(model: onnx.ModelProto, layer: str) -> onnx.NodeProto:
    """The node that computes a layer, alone or with others."""
    return next(node for node in model.graph.node if f"{layer}.packed" in node.input)


def verdict_of(bundle: Path, candidate_bundle: Path, images: int = 2) -> tuple[str, Metrics]:
    """Torch on one bundle, ONNX Runtime on the other, over a few samples and a three-step episode."""
    reference, candidate = load("torch", bundle, 1), load("ort", candidate_bundle, 1)
    pair = Pair(
        ModelUnderTest("torch", reference),
        ModelUnderTest("ort", candidate),
        Processor.from_pretrained(bundle),
        4,
    )
    evalset, config = load_evalset(), reference.config
    metrics = compare(pair, choose(evalset, config, images, images), longest_episode(evalset, config, 3))
    return judge(metrics).verdict, metrics
