"""Committed instruction counts, and the gate that compares new ones with them.

The key of a baseline holds all that counts depend on, so that another compiler, ONNX Runtime or graph is never compared
with it. Weights are not in the key: no count depends on them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from microvlm.atomic import write_file
from microvlm.backends.emulation.sysroot import system_name
from microvlm.bench.pi.counting.instruction_cost import Cost, Counted
from microvlm.bench.pi.pi_records import CountReport, PhaseCounts
from microvlm.bench.pi.workload_phases import PICTURE
from microvlm.config import CONFIG
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import quote
from microvlm.formats.manifest import read_manifest

FOLDER = Path(__file__).parent / "baselines"
TOLERANCE = 0.005
"""Allowed share of a phase's instructions. Two runs of one program from the same folders are equal."""
NOISE = 10_000
"""Instructions: a phase of a million may differ by this much on another machine, where paths are longer or shorter and
the C library finds its memory elsewhere."""
REMEDY = "export the model again"
BEHIND = ("prompt", "answers")
"""Parts of a configuration that no graph holds."""
READ_BEHIND = ("pointing",)
"""Settings of the memory that are applied to what a graph read, and change no graph."""
UNGATED = ("load", PICTURE)
"""Importing modules and opening files, which is different when a file is read for the first time, and Pillow's decoder:
not the model's."""


def key_of(counted: Counted, bundle: Path) -> dict[str, str]:
    """Everything that a count depends on, except our own code."""
    ran = counted.ran
    return {
        "graphs": graphs_hash(bundle),
        "cpu": ran["cpu"],
        "onnxruntime": ran["onnxruntime"],
        "numpy": ran["numpy"],
        "python": ".".join(ran["python"].split(".")[:2]),
        "system": system_name(),
        "compiler": ran["compiler"],
    }


def graphs_hash(bundle: Path) -> str:
    """One hash of what the bundle's graphs compute: sizes, widths and graphs of its manifest, and no weight.

    What follows the graphs is left out: prompts, how sure an answer is and how clearly a read points at an entry.
    """
    manifest = msgspec.to_builtins(read_manifest(bundle))
    config = documents.load(bundle / CONFIG, dict[str, Any], REMEDY)
    described = {name: manifest[name] for name in ("bits", "packing", "embedding_bits", "graphs")}
    parts = {name: value for name, value in config.items() if isinstance(value, dict) and name not in BEHIND}
    if "memory" in parts:
        parts["memory"] = {name: value for name, value in parts["memory"].items() if name not in READ_BEHIND}
    text = json.dumps([described, parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def of_graphs(bundle: Path, cpu: str) -> CountReport | None:
    """The committed baseline whose graphs are the bundle's, whatever the model's name and weights; None without one."""
    graphs = graphs_hash(bundle)
    paths = sorted(path for path in FOLDER.glob("*.json") if path.stem.endswith(f"-{cpu}"))
    baselines = [baseline for path in paths if (baseline := load(path)) is not None]
    return next((baseline for baseline in baselines if baseline.key.graphs == graphs), None)


def load(path: Path) -> CountReport | None:
    """A baseline; None where there is no file. Raises UserError for one that is damaged."""
    try:
        return documents.load(path, CountReport, "make it again with --update-baseline")
    except FileNotFoundError:
        return None


def path_of(name: str, cpu: str, folder: Path = FOLDER) -> Path:
    """One file for a model and a CPU: a new key replaces the old one."""
    return folder / re.sub(r"[^a-z0-9.-]", "-", f"{name}-{cpu}.json".lower())


def write(name: str, key: dict[str, str], costs: Sequence[Cost], folder: Path = FOLDER) -> Path:
    path = path_of(name, key["cpu"], folder)
    phases = {
        cost.phase: {
            "instructions": cost.instructions,
            "simd": cost.simd,
            "others": cost.instructions - cost.kernel_instructions,
        }
        for cost in costs
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"report": "counts", "model": name, "key": key, "phases": phases}
    write_file(path, json.dumps(document, indent=1) + "\n")
    return path


def check(name: str, key: dict[str, str], costs: Sequence[Cost], folder: Path = FOLDER) -> list[str]:
    """One sentence for every phase that changed, or for every part of the key that differs; empty if none did."""
    path = path_of(name, key["cpu"], folder)
    try:
        baseline = load(path)
    except UserError as error:
        return [str(error)]
    if baseline is None:
        return [
            f"there is no baseline for {name} on {key['cpu']}: "
            f"give --update-baseline in place of --gate, which writes {path.name}"
        ]
    recorded = msgspec.structs.asdict(baseline.key)
    differing = [part for part in key if recorded[part] != key[part]]
    if differing:
        return [
            f"the baseline is for another {part}: {quote(recorded[part])} there, {quote(key[part])} here"
            for part in differing
        ]
    return [sentence for cost in costs for sentence in _changes(cost, baseline.phases)]


def _changes(cost: Cost, phases: dict[str, PhaseCounts]) -> list[str]:
    if cost.phase in UNGATED:
        return []
    if cost.phase not in phases:
        return [f"{cost.phase} is not in the baseline"]
    sentences = []
    counted = phases[cost.phase]
    for figure, before, now in (
        ("instructions", counted.instructions, cost.instructions),
        ("simd", counted.simd, cost.simd),
    ):
        if abs(now - before) > max(TOLERANCE * before, NOISE):
            change = f"{now / before - 1:+.1%}" if before else "none were counted"
            sentences.append(f"{cost.phase}: {now:,} {figure} instead of {before:,} ({change})")
    return sentences
