"""Saved JSON documents as tables: each names its kind in its field `report`. Reads JSON, measures nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from microvlm.bench import score_tables
from microvlm.bench.equivalence import equivalence_tables
from microvlm.bench.full import full_tables
from microvlm.bench.kernels import kernel_tables
from microvlm.bench.memory import memory_tables
from microvlm.bench.pi import count_tables, pi_tables
from microvlm.bench.speed import speed_tables
from microvlm.bench.tables import Report
from microvlm.errors import UserError

Document = dict[str, Any]

READERS: dict[str, Callable[[Document], Report]] = {
    "run": speed_tables.report,
    "equivalence": equivalence_tables.report,
    "kernels": kernel_tables.report,
    "full": full_tables.report,
    "sizes": full_tables.sizes_report,
    "memory": memory_tables.report,
    "pi": pi_tables.report,
    "score": score_tables.report,
    "fit": pi_tables.fit_report,
    "counts": count_tables.report,
}
"""Function that renders a document, by kind. `microvlm-bench KIND` writes documents, `microvlm-score` those of kind
`score`; `counts` is a baseline of `pi`."""
_OF_ANOTHER_SHAPE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def load_document(path: Path) -> Document:
    """Raises UserError for a file that is missing, or no JSON object."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: save a report with -o first.") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON: give a file that -o wrote.") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} is not a report of microvlm-bench: give a file that -o wrote.")
    return document


def report_of_file(path: Path) -> Report:
    """Raises UserError, which names the file."""
    document = load_document(path)
    try:
        return read_report(document)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_report(document: Document) -> Report:
    """The tables of a document; its last remark says where it was measured.

    Raises UserError for a document without a known `report` field (versions before that field did not write it), or
    one that lacks a figure of its kind.
    """
    kind = document.get("report")
    if not isinstance(kind, str) or kind not in READERS:
        problem = (
            "has no field 'report'" if kind is None else f"has the unknown kind {kind!r:.40} in 'report'"
        )
        raise UserError(
            f"this is not a report of microvlm-bench, or one of another version: it {problem} "
            f"({', '.join(READERS)}); make it again with -o."
        )
    try:
        report = READERS[kind](document)
        if kind != "counts":  # which is of no machine: its own remark says where it comes from
            report = report._replace(remarks=[*report.remarks, provenance_line(document["provenance"])])
        # A figure of another type is found here, and not when somebody prints it.
        report.text()
        report.markdown()
    except _OF_ANOTHER_SHAPE as error:
        raise UserError(
            f"this '{kind}' report is damaged or of another version ({type(error).__name__}: {error!s:.80}); "
            "make it again with -o."
        ) from None
    return report


def text(document: Document) -> str:
    """Renders a document for a terminal. Raises UserError."""
    return read_report(document).text()


def markdown(document: Document) -> str:
    """Raises UserError."""
    return read_report(document).markdown()


def provenance_line(facts: dict[str, Any]) -> str:
    """Machine, versions, commit and date, on one line; what a document does not know is left out."""
    threads = facts.get("threads") or "default"
    if isinstance(threads, list):
        threads = ", ".join(map(str, threads))
    parts = [
        facts["cpu"],
        f"{facts['cores']} cores, threads: {threads}" if facts.get("cores") else "",
        f"load {facts['load_average'][0]}" if facts.get("load_average") else "",
        facts.get("os"),
        f"Python {facts['python']}" if facts.get("python") else "",
        *(f"{name} {version}" for name, version in facts["versions"].items() if version),
    ]
    return f"{', '.join(part for part in parts if part)}; {_commit(facts.get('commit'))}{facts['date_utc']}"


def _commit(commit: dict[str, Any] | None) -> str:
    if not commit:
        return ""
    changed = " with changes" if commit["changed"] else ""
    return f"commit {commit['hash'][:10]}{changed} of {commit['date'][:10]}, measured "
