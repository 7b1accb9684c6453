"""`microvlm-bench compare` of two saved documents of `run`: what samples that were not taken in turns can tell."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from microvlm.bench.comparison.judgement import (
    LEVEL,
    Judgement,
    outliers,
    summary,
    unpaired_ratio,
    verdict_of,
)
from microvlm.bench.report import LARGEST_REPORT, REMEDY
from microvlm.bench.speed.phases import PHASES
from microvlm.bench.speed.speed_records import Result, SpeedReport
from microvlm.errors import UserError
from microvlm.formats import documents

MARGIN = 0.05
"""Smallest difference that counts: two runs of one build differ by up to this on a machine that does other work too."""
NOT_IN_TURNS = (
    "A and B were not measured in turns: whatever changed on the machine between them counts as a difference; "
    "compare the models themselves to know"
)
Pair = tuple[Result, Result]


def compare_saved(first: Path, second: Path, margin: float = MARGIN) -> dict[str, Any]:
    """The document of a comparison of two documents of `run`, of the backends that both measured.

    Raises UserError for other documents, those without samples, and those without a common backend.
    """
    (a, _), (b, provenance) = _read(first), _read(second)
    pairs = _common(a, b, (first, second))
    names = [(f"{one.label}: {phase}", phase, (one, two)) for one, two in pairs for phase in PHASES]
    measured = [(name, *_samples(pair, phase)) for name, phase, pair in names if phase in pair[0].phases]
    measured = [(name, ours, theirs) for name, ours, theirs in measured if ours and theirs]
    if not measured:
        raise UserError(
            f"{first} or {second} holds no samples, as those of older versions: make them again with run -o."
        )
    level = 1 - (1 - LEVEL) / len(measured)
    judgements = []
    for name, ours, theirs in measured:
        ratio = unpaired_ratio(ours, theirs, level)
        judgements.append(Judgement(name, ratio, verdict_of(ratio, margin)))
    verdict, sentence = summary(judgements)
    return {
        "report": "compare",
        "in_turns": False,
        "verdict": verdict,
        "sentence": sentence,
        "a": _side(pairs[0][0], a, first),
        "b": _side(pairs[0][1], b, second),
        "margin": margin,
        "level": LEVEL,
        "quantities": [
            _quantity(judgement, samples[1:]) for judgement, samples in zip(judgements, measured, strict=True)
        ],
        "energy_note": None,
        "remarks": [NOT_IN_TURNS, *_machines(a, b)],
        "provenance": provenance,
    }


class _Raw(msgspec.Struct, frozen=True):
    """The kind of a document and its provenance as it stands there."""

    report: str
    provenance: dict[str, Any]


def _read(path: Path) -> tuple[SpeedReport, dict[str, Any]]:
    try:
        content = documents.read_file(path, LARGEST_REPORT)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: save a document with run -o first.") from None
    raw = documents.parse(content, _Raw, path, REMEDY)
    if raw.report != "run":
        raise UserError(f"{path} is a '{raw.report}' report: give two documents of run, or two models.")
    return documents.parse(content, SpeedReport, path, REMEDY), raw.provenance


def _common(a: SpeedReport, b: SpeedReport, paths: tuple[Path, Path]) -> list[Pair]:
    others = {result.label: result for result in b.results if result.status == "ok"}
    pairs = [
        (result, others[result.label])
        for result in a.results
        if result.status == "ok" and result.label in others
    ]
    if not pairs:
        raise UserError(f"{paths[0]} and {paths[1]} have measured no backend of the same name.")
    return pairs


def _samples(pair: Pair, phase: str) -> tuple[list[float], list[float]]:
    ours, theirs = (result.phases.get(phase) for result in pair)
    return (ours.samples_ms if ours else []), (theirs.samples_ms if theirs else [])


def _side(result: Result, document: SpeedReport, path: Path) -> dict[str, Any]:
    models = ", ".join(model.name for model in document.provenance.models)
    return {
        "model": f"{models} in {path.name}",
        "backend": "every backend of both",
        "path": result.path or "",
    }


def _quantity(judgement: Judgement, samples: tuple[list[float], list[float]]) -> dict[str, Any]:
    return {
        "name": judgement.name,
        "unit": "ms",
        "medians": [float(np.median(values)) for values in samples],
        **{key: round(value, 5) for key, value in judgement.ratio._asdict().items()},
        "verdict": judgement.verdict,
        "sentence": judgement.sentence,
        "outliers": [asdict(outliers(np.asarray(values))) for values in samples],
    }


def _machines(a: SpeedReport, b: SpeedReport) -> list[str]:
    """What makes two documents hard to compare."""
    ours, theirs = a.provenance, b.provenance
    remarks = []
    if (ours.cpu, ours.cores) != (theirs.cpu, theirs.cores):
        remarks.append(
            f"other machines: A on {ours.cpu}, B on {theirs.cpu}; times say nothing about the code"
        )
    if ours.threads != theirs.threads:
        remarks.append(f"A ran on {ours.threads} threads and B on {theirs.threads}")
    remarks.append(f"A was measured {_when(a)}, B {_when(b)}")
    return remarks


def _when(document: SpeedReport) -> str:
    commit = document.provenance.commit
    return document.provenance.date_utc + (f" at commit {commit.hash[:10]}" if commit else "")
