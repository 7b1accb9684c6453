"""Holds the limits of a gate file against saved documents. Measures nothing."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

from microvlm.bench.gates.gate_records import GateFile, Limit
from microvlm.bench.gates.metric_path import MissingMetric, look_up, parse_path
from microvlm.bench.gates.result_store import read_store
from microvlm.bench.report import LARGEST_REPORT
from microvlm.errors import UserError
from microvlm.formats import documents

STORE = ".jsonl"
_REMEDY = "mend the gate file; microvlm-bench gate --help tells its form"
LARGEST_GATE = 1_000_000


def read_gate(path: Path) -> GateFile:
    """Read a gate file, TOML or JSON by its name's end. Raises UserError."""
    try:
        content = documents.read_file(path, LARGEST_GATE)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a file with limits, JSON or TOML.") from None
    if path.suffix != ".toml":
        gate = documents.parse(content, GateFile, path, _REMEDY)
    else:
        try:
            table = tomllib.loads(content.decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"{path} is not valid TOML ({error}): {_REMEDY}.") from None
        gate = documents.convert(table, GateFile, path, _REMEDY)
    for limit in gate.limits:
        parse_path(limit.metric)
    return gate


def check_gate(path: Path, document: Path | None = None) -> dict[str, Any]:
    """The document of `gate`: every limit with its value and whether it is met. `document` is the command line's.

    Raises UserError for a wrong gate file and for documents that cannot be read; a figure that a document lacks breaks
    its limit.
    """
    gate = read_gate(path)
    files = _Files(path.parent)
    checked = []
    for limit in gate.limits:
        source = files.path(limit.document) if limit.document else document
        if source is None:
            raise UserError(
                f"{path}: the limit on {limit.metric} names no document: name one there, or give one on the command "
                "line."
            )
        baseline = limit.baseline or gate.baseline
        against = files.read(files.path(baseline), limit.kind) if baseline else None
        checked.append(_check(limit, source.name, files.read(source, limit.kind), against, path))
    return {
        "report": "gate",
        "gate": path.name,
        "met": all(entry["met"] for entry in checked),
        "limits": checked,
    }


class _Files:
    """Documents by path, each read once; paths of a gate file are relative to its folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._read: dict[tuple[Path, str | None], Any] = {}

    def path(self, name: str) -> Path:
        return self._folder / name

    def read(self, path: Path, kind: str | None) -> Any:
        if (path, kind) not in self._read:
            self._read[path, kind] = _newest(path, kind) if path.suffix == STORE else _document(path)
        return self._read[path, kind]


def _document(path: Path) -> Any:
    try:
        content = documents.read_file(path, LARGEST_REPORT)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: save a document with -o first.") from None
    return documents.parse(content, dict[str, Any], path, "make it again with -o")


def _newest(path: Path, kind: str | None) -> Any:
    results = [result for result in read_store(path) if kind is None or result.kind == kind]
    if not results:
        raise UserError(
            f"{path} holds no result{f' of the kind {kind}' if kind else ''}: add one with --store."
        )
    return results[-1].document


def _check(limit: Limit, name: str, document: Any, baseline: Any, gate: Path) -> dict[str, Any]:
    try:
        value = look_up(document, limit.metric)
        demands = _demands(limit, baseline, gate)
    except MissingMetric as clause:
        return _entry(limit, name, None, "to be there", False, f"{clause}")
    demanded = " and ".join(words for words, _ in demands)
    if limit.one_of is not None:
        met = isinstance(value, str) and value in limit.one_of
        return _entry(limit, name, str(value), demanded, met, f"'{value}'")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _entry(limit, name, None, demanded, False, "it is no number")
    met = all(low <= value <= high for _, (low, high) in demands)
    return _entry(limit, name, float(value), demanded, met, f"{value:.6g}")


def _demands(limit: Limit, baseline: Any, gate: Path) -> list[tuple[str, tuple[float, float]]]:
    """Each demand in words, and its range. Raises MissingMetric for a baseline without the figure."""
    demands: list[tuple[str, tuple[float, float]]] = []
    if limit.one_of is not None:
        demands.append(("one of " + ", ".join(limit.one_of), (0, 0)))
    if limit.min is not None:
        demands.append((f">= {limit.min:.6g}", (limit.min, math.inf)))
    if limit.max is not None:
        demands.append((f"<= {limit.max:.6g}", (-math.inf, limit.max)))
    if limit.min_ratio is None and limit.max_ratio is None:
        return demands
    if baseline is None:
        raise UserError(
            f"{gate}: the limit on {limit.metric} is a ratio and has no baseline: name its document."
        )
    base = look_up(baseline, limit.metric)
    if isinstance(base, bool) or not isinstance(base, int | float):
        raise MissingMetric("the baseline has no number there")
    for ratio, sign in ((limit.min_ratio, ">="), (limit.max_ratio, "<=")):
        if ratio is not None:
            end = ratio * base
            ends = (end, math.inf) if sign == ">=" else (-math.inf, end)
            demands.append((f"{sign} {ratio:g} x {base:.6g}", ends))
    return demands


def _entry(
    limit: Limit, name: str, value: float | str | None, demanded: str, met: bool, words: str
) -> dict[str, Any]:
    return {
        "document": name,
        "metric": limit.metric,
        "value": value,
        "demanded": demanded,
        "met": met,
        "sentence": f"{name}: {limit.metric} is {'' if met else 'not '}as demanded ({demanded}): {words}",
    }
