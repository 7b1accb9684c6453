"""Records what a stage ran with (code, precision, optimisers) at every start and resumption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import microvlm
from microvlm.formats import documents

RUNS = "runs.jsonl"


def _hash_code() -> str:
    """sha256 over the names and bytes of the Python files of the model and of the training."""
    package = Path(microvlm.__file__).parent
    files = sorted(package.glob("*.py"))
    for folder in ("configuration", "formats", "inputs", "memory", "model", "training"):
        files += sorted((package / folder).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(package).as_posix()
        digest.update(f"{name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


CODE_SHA256 = _hash_code()
"""Hash of the files as they were when this process started: the code that it runs."""


def record_run(folder: Path, step: int, precision: str, optimizers: Sequence[str]) -> None:
    """Append a line to `folder`/runs.jsonl: the stage starts or resumes at `step`."""
    row = {
        "from_step": step,
        "code_sha256": CODE_SHA256,
        "precision": precision,
        "optimizers": list(optimizers),
        "torch": torch.__version__,
    }
    with (folder / RUNS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def recorded_runs(out: Path, stages: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Stage -> the lines of its runs.jsonl, for the stages that have one. Raises UserError for a damaged line."""
    files = {stage: out / stage / RUNS for stage in stages}
    return {stage: _rows(file) for stage, file in files.items() if file.is_file()}


def _rows(file: Path) -> list[dict[str, Any]]:
    remedy = "delete this line and run the same command again"
    lines = documents.read_file(file).splitlines()
    return [
        documents.parse(line, dict[str, Any], f"line {number} of {file}", remedy)
        for number, line in enumerate(lines, 1)
    ]
