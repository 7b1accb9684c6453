"""`microvlm-bench equivalence --matrix`: every backend and precision against one reference, a verdict a cell.

A cell is `microvlm-bench equivalence` in a process of its own: the native library chooses its kernels once a process, a
broken one may end it, and then the others go on. Nothing is judged here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from microvlm.backends import backend_names, get_backend, native, resolve_bundle
from microvlm.bench.equivalence.equivalence_records import EquivalenceReport
from microvlm.bench.equivalence.verdict import FAIL
from microvlm.bench.provenance import describe_model, provenance
from microvlm.bench.temporary_environment import environment
from microvlm.console import BAD_INPUT, GATE_FAILED
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.sources.model_source import find_model

Progress = Callable[[str], None]
REFERENCE = "torch"
REFERENCE_CELL, SKIPPED = "reference", "skipped"
VARIANT, NATIVE = "MICROVLM_KERNELS", native.SWITCH
PROGRAM = (sys.executable, "-P", "-c", "from microvlm.cli import bench; bench()")
EMULATED = "ort-arm64"
EMULATED_SAMPLES = ("--images", "1", "--episode-steps", "4", "--new-tokens", "8")
"""An emulated processor takes a hundred times as long; these samples run every graph."""
_FIGURES = (
    "kl_mean",
    "kl_p99",
    "kl_max",
    "top1_agreement",
    "top5_agreement",
    "probability_change_rms",
    "greedy_match",
)


@dataclass(frozen=True)
class Column:
    """A backend, and the variables of its process that choose its kernels."""

    name: str
    backend: str
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A way of storing the weights: a value of --bits, --packing and --embedding-bits, or a bundle as it is."""

    name: str
    bits: float = 1.58
    packing: str = "2bit"
    embedding_bits: int = 8

    def bundle(self, model: str) -> Path:
        return resolve_bundle(model, self.bits, self.packing, self.embedding_bits)


AS_EXPORTED = Row("1.58 bit")
ROWS = (
    AS_EXPORTED,
    Row("1.58 bit, base3", packing="base3"),
    Row("4 bit", bits=4),
    Row("8 bit", bits=8),
    Row("16 bit", bits=16),
    Row("1.58 bit, embedding of 4", embedding_bits=4),
)


def run(model: str, images: int, threads: int | None, progress: Progress = lambda _: None) -> dict[str, Any]:
    """The document: every cell with its verdict and figures. A bundle has one row, its own. Raises UserError."""
    is_bundle = find_model(model).kind == "bundle"
    rows = (Row("as exported"),) if is_bundle else ROWS
    first = resolve_bundle(model)
    cells = []
    for row in rows:
        bundle = first if row is rows[0] else row.bundle(model)
        for column in columns() if row is rows[0] else main_columns():
            progress(f"{row.name} on {column.name}")
            cells.append(_cell(row, column, first, bundle, images, threads))
    return {
        "report": "matrix",
        "reference": f"{rows[0].name} on {REFERENCE}",
        "images": images,
        "cells": cells,
        "verdict": FAIL if any(cell["verdict"] == FAIL for cell in cells) else "PASS",
        "provenance": provenance(describe_model(first), threads),
    }


def columns() -> list[Column]:
    """Every backend that is registered, `ort` once for each kernel variant that runs here and without the library."""
    found = [Column(REFERENCE, REFERENCE)]
    if native.library_path() is not None:
        found += [
            Column(f"ort, {variant}", "ort", {NATIVE: "", VARIANT: variant}) for variant in native.variants()
        ]
    found.append(_BODIES)
    others = (name for name in sorted(backend_names()) if name not in (REFERENCE, "ort"))
    return found + [Column(name, name) for name in others]


def main_columns() -> list[Column]:
    """What the other precisions are run on: PyTorch, the best kernels, and the graphs' own functions."""
    best = [column for column in columns() if column.backend == "ort" and column is not _BODIES][:1]
    return [Column(REFERENCE, REFERENCE), *best, _BODIES]


_BODIES = Column("ort, function bodies", "ort", {NATIVE: "0"})


def _cell(
    row: Row, column: Column, reference: Path, bundle: Path, images: int, threads: int | None
) -> dict[str, Any]:
    head = {"precision": row.name, "backend": column.name}
    if bundle == reference and column.backend == REFERENCE:
        return {**head, "verdict": REFERENCE_CELL, "reasons": []}
    reason = _unavailable(column)
    if reason is not None:
        return {**head, "verdict": SKIPPED, "reasons": [reason]}
    arguments = [
        "equivalence",
        str(reference),
        "--reference",
        REFERENCE,
        "--candidate",
        column.backend,
        "--json",
    ]
    if bundle != reference:
        arguments += ["--against", str(bundle)]
    arguments += [] if threads is None else ["--threads", str(threads)]
    arguments += EMULATED_SAMPLES if column.backend == EMULATED else ["--images", str(images)]
    return {**head, **_run_cell(arguments, column.variables)}


def _unavailable(column: Column) -> str | None:
    with environment(NATIVE, column.variables.get(NATIVE, os.environ.get(NATIVE, ""))):
        try:
            return get_backend(column.backend).unavailable()
        except UserError as error:
            return str(error)


def _run_cell(arguments: Sequence[str], variables: Mapping[str, str]) -> dict[str, Any]:
    """Run one comparison in its own process -> the entries of its cell. Its verdict is 0 or 1, a refusal 2."""
    process = subprocess.run(
        [*PROGRAM, *arguments], env={**os.environ, **variables}, capture_output=True, text=True
    )
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    if process.returncode == BAD_INPUT:
        return {"verdict": SKIPPED, "reasons": [lines[-1].removeprefix("Error: ") if lines else "refused"]}
    if process.returncode not in (0, GATE_FAILED) or not process.stdout:
        code = process.returncode
        how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        said = lines[-1] if lines else "it said nothing"
        return {"verdict": FAIL, "reasons": [f"its process {how}: {said}"]}
    compared = documents.parse(process.stdout, EquivalenceReport, "the report of a cell", "run it by itself")
    document = json.loads(process.stdout)
    return {
        "verdict": compared.verdict,
        "reasons": list(compared.reasons),
        "question": compared.question,
        "kernels": compared.candidate.kernels,
        "positions": compared.positions,
        **{name: document[name] for name in _FIGURES},
        "sums": compared.replay.sums,
        "sums_differing": compared.replay.sums_differing,
        "starts_at": msgspec.to_builtins(compared.starts_at),
    }
