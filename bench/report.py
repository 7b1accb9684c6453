"""Saved reports as tables: each names its kind in its field `report`. Measures nothing.

A document of every kind is parsed into a record of its own before anything is rendered, so that a file that is no
report, or a damaged one, or one of another version, is one sentence with the name of the field.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from microvlm.bench import hardening_tables
from microvlm.bench.attention import attention_tables
from microvlm.bench.attention.attention_records import AttentionReport
from microvlm.bench.comparison import comparison_tables
from microvlm.bench.comparison.comparison_records import ComparisonReport, TrialsReport
from microvlm.bench.conversation import conversation_tables
from microvlm.bench.conversation.conversation_records import ConversationReport
from microvlm.bench.equivalence import equivalence_tables, matrix_report
from microvlm.bench.equivalence.equivalence_records import EquivalenceReport
from microvlm.bench.equivalence.matrix_report import MatrixReport
from microvlm.bench.full import full_tables
from microvlm.bench.full.full_records import FullReport, SizesReport
from microvlm.bench.gates import gate_tables
from microvlm.bench.gates.gate_records import GateReport
from microvlm.bench.kernels import kernel_tables
from microvlm.bench.kernels.kernel_records import KernelReport
from microvlm.bench.loops import loop_tables
from microvlm.bench.loops.loop_records import LoopReport
from microvlm.bench.memory import memory_tables
from microvlm.bench.memory.memory_records import Part, SeveralParts
from microvlm.bench.paths import path_tables
from microvlm.bench.paths.path_records import PathReport
from microvlm.bench.peers import peer_tables
from microvlm.bench.peers.peer_records import PeerReport
from microvlm.bench.pi import count_tables, pi_tables
from microvlm.bench.pi.pi_records import CountReport, FitReport, PiReport
from microvlm.bench.precisions import precision_tables
from microvlm.bench.precisions.precision_records import PrecisionReport
from microvlm.bench.records import Commit, Provenance
from microvlm.bench.scores import answer_tables, caption_tables, score_tables, text_tables
from microvlm.bench.scores.answer_records import AnswerReport
from microvlm.bench.scores.caption_records import CaptionReport
from microvlm.bench.scores.score_records import ScoreReport
from microvlm.bench.scores.text_records import TextReport
from microvlm.bench.speed import speed_tables
from microvlm.bench.speed.speed_records import SpeedReport
from microvlm.bench.tables import Report
from microvlm.bench.training import design_tables, leaderboard_tables, step_tables, training_tables
from microvlm.bench.training.design_records import DesignReport
from microvlm.bench.training.leaderboard_records import Leaderboard
from microvlm.bench.training.step_records import StepReport
from microvlm.bench.training.training_records import SeveralCosts, TrainingReport
from microvlm.errors import UserError
from microvlm.formats import documents

Document = dict[str, Any]
LARGEST_REPORT = 8_000_000
"""Bytes of a file: a report of a full-size memory has 200 KB."""
REMEDY = "the report is damaged or of another version; make it again with -o"


class Reader(NamedTuple):
    """How a kind of report is read: the record that it must be, and the function that renders this record."""

    record: type[Any]
    render: Callable[[Any], Report]


READERS: dict[str, Reader] = {
    "run": Reader(SpeedReport, speed_tables.report),
    "equivalence": Reader(EquivalenceReport, equivalence_tables.report),
    "matrix": Reader(MatrixReport, matrix_report.report),
    "compare": Reader(ComparisonReport, comparison_tables.report),
    "trials": Reader(TrialsReport, comparison_tables.trials_report),
    "gate": Reader(GateReport, gate_tables.report),
    "kernels": Reader(KernelReport, kernel_tables.report),
    "loops": Reader(LoopReport, loop_tables.report),
    "full": Reader(FullReport, full_tables.report),
    "sizes": Reader(SizesReport, full_tables.sizes_report),
    "paths": Reader(PathReport, path_tables.report),
    "peers": Reader(PeerReport, peer_tables.report),
    "precisions": Reader(PrecisionReport, precision_tables.report),
    "memory": Reader(Part, memory_tables.report),
    "conversation": Reader(ConversationReport, conversation_tables.report),
    "attention": Reader(AttentionReport, attention_tables.report),
    "pi": Reader(PiReport, pi_tables.report),
    "score": Reader(ScoreReport, score_tables.report),
    "captions": Reader(CaptionReport, caption_tables.report),
    "answers": Reader(AnswerReport, answer_tables.report),
    "texts": Reader(TextReport, text_tables.report),
    "fit": Reader(FitReport, pi_tables.fit_report),
    "counts": Reader(CountReport, count_tables.report),
    "train": Reader(StepReport, step_tables.report),
    "ternary_designs": Reader(DesignReport, design_tables.report),
    "leaderboard": Reader(Leaderboard, leaderboard_tables.report),
    "training": Reader(TrainingReport, training_tables.report),
    "training_costs": Reader(SeveralCosts, training_tables.costs_report),
    "mutations": Reader(hardening_tables.MutationReport, hardening_tables.mutation_report),
    "kills": Reader(hardening_tables.KillReport, hardening_tables.kill_report),
}
"""By kind. `microvlm-bench KIND` writes documents, `microvlm-score` those of kind `score`, `captions`, `answers` and
`texts`; `counts` is a baseline of `pi`, `microvlm-train leaderboard` writes `leaderboard`, `summary.json` of a run of
`microvlm-train` is a `training` one, `python tests/fuzz` writes `mutations`, `python tests/kills` writes `kills` and
`.ci/compare_bar.py` writes `trials`."""
UNMEASURED = ("counts", "training_costs", "leaderboard", "gate")
"""Kinds that are of no machine, or of several: their own remarks or rows say where the figures come from."""
_SEVERAL_MODELS = Reader(SeveralParts, memory_tables.report)
"""A document of kind `memory` with `subjects`."""


class _Head(msgspec.Struct, frozen=True):
    """What tells the kind of a document."""

    report: Any = None
    subjects: msgspec.Raw = msgspec.Raw(b"null")


def report_of_file(path: Path) -> Report:
    """The tables of a saved report. Raises UserError, which names the file."""
    try:
        content = documents.read_file(path, LARGEST_REPORT)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: save a report with -o first.") from None
    return parse_report(content, str(path))


def read_report(document: Document) -> Report:
    """The tables of a document that this process made. Raises UserError as `parse_report` does."""
    return parse_report(json.dumps(document, allow_nan=False).encode(), "this document")


def parse_report(content: bytes, origin: str) -> Report:
    """The tables of a document; its last remark says where it was measured.

    Raises UserError for a document without a known `report` field (versions before that field did not write it), and
    for one that lacks a figure of its kind or has one of another type.
    """
    head = documents.parse(content, _Head, origin, REMEDY)
    kind = head.report
    if not isinstance(kind, str) or kind not in READERS:
        problem = "has no field 'report', as reports of older versions"
        if kind is not None:
            problem = f"is of the kind {documents.quote(kind)}, perhaps of a newer version"
        raise UserError(
            f"{origin} is not a report that this version knows: it {problem}; the kinds are {', '.join(READERS)}: "
            "make it again with -o."
        )
    reader = _SEVERAL_MODELS if kind == "memory" and bytes(head.subjects) != b"null" else READERS[kind]
    record = documents.parse(content, reader.record, f"{origin} (a '{kind}' report)", REMEDY)
    report = reader.render(record)
    if kind not in UNMEASURED:
        report = report._replace(remarks=[*report.remarks, provenance_line(record.provenance)])
    return report.printable()


def text(document: Document) -> str:
    """Renders a document for a terminal. Raises UserError."""
    return read_report(document).text()


def markdown(document: Document) -> str:
    """Raises UserError."""
    return read_report(document).markdown()


def provenance_line(facts: Provenance) -> str:
    """Machine, versions, commit and date, on one line; what a document does not know is left out."""
    threads = facts.threads or "default"
    if isinstance(threads, list):
        threads = ", ".join(map(str, threads))
    parts = [
        facts.cpu,
        f"{facts.cores} cores, threads: {threads}" if facts.cores else "",
        f"load {facts.load_average[0]}" if facts.load_average else "",
        facts.os,
        f"Python {facts.python}" if facts.python else "",
        *(f"{name} {version}" for name, version in facts.versions.items() if version),
    ]
    return f"{', '.join(part for part in parts if part)}; {_commit(facts.commit)}{facts.date_utc}"


def _commit(commit: Commit | None) -> str:
    if commit is None:
        return ""
    changed = " with changes" if commit.changed else ""
    return f"commit {commit.hash[:10]}{changed} of {commit.date[:10]}, measured "
