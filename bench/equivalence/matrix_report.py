"""The report of `microvlm-bench equivalence --matrix`: its records and its tables. Measures nothing."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.equivalence.equivalence_records import Start
from microvlm.bench.records import MOST_COLUMNS, Figure, Provenance
from microvlm.bench.tables import Report, Rows, Table
from microvlm.formats.documents import Count


class Cell(msgspec.Struct, frozen=True):
    """One backend with one precision against the reference. Figures are None where nothing was compared."""

    precision: str
    backend: str
    verdict: str
    reasons: list[str]
    question: str | None = None
    kernels: str | None = None
    positions: Count | None = None
    kl_mean: Figure | None = None
    kl_p99: Figure | None = None
    kl_max: Figure | None = None
    top1_agreement: Figure | None = None
    top5_agreement: Figure | None = None
    probability_change_rms: Figure | None = None
    greedy_match: Figure | None = None
    sums: Count | None = None
    sums_differing: Count | None = None
    starts_at: Start = Start()


class MatrixReport(msgspec.Struct, frozen=True):
    """The whole document."""

    reference: str
    verdict: str
    cells: Annotated[list[Cell], Meta(max_length=MOST_COLUMNS * MOST_COLUMNS)]
    provenance: Provenance


def report(document: MatrixReport) -> Report:
    compared = [cell for cell in document.cells if cell.positions is not None]
    failed = [cell for cell in document.cells if cell.verdict == "FAIL"]
    right = len(compared) - sum(cell in failed for cell in compared)
    head = (
        f"{right} of {len(compared)} cells are the same model as the "
        f"reference ({document.reference}), or cost no more than allowed"
    )
    tables = [
        Table("matrix", "verdicts: precision, backend", _verdicts(document.cells)),
        Table("figures", "against the reference", _figures(compared)),
    ]
    remarks = [f"{cell.precision} on {cell.backend}: {'; '.join(cell.reasons)}" for cell in failed]
    remarks += [
        f"{cell.precision} on {cell.backend} was not compared: {'; '.join(cell.reasons)}"
        for cell in document.cells
        if cell.verdict == "skipped"
    ]
    return Report(head, tables, remarks)


def _verdicts(cells: list[Cell]) -> Rows:
    backends = list(dict.fromkeys(cell.backend for cell in cells))
    rows = [["", *backends]]
    for precision in dict.fromkeys(cell.precision for cell in cells):
        own = {cell.backend: cell.verdict for cell in cells if cell.precision == precision}
        rows.append([precision, *(own.get(backend, "-") for backend in backends)])
    return rows


def _figures(cells: list[Cell]) -> Rows:
    rows = [
        ["", "KL mean", "p99", "max", "top-1", "top-5", "RMS of p", "sums that differ", "starts to differ at"]
    ]
    for cell in cells:
        start = cell.starts_at
        tie = f"{start.tie}, a tie" if start.tie else "-"
        rows.append(
            [
                f"{cell.precision} on {cell.backend}",
                *(_small(value) for value in (cell.kl_mean, cell.kl_p99, cell.kl_max)),
                *(_share(value) for value in (cell.top1_agreement, cell.top5_agreement)),
                _small(cell.probability_change_rms),
                "-" if cell.sums is None else f"{cell.sums_differing or 0:,} of {cell.sums:,}",
                start.layer or tie,
            ]
        )
    return rows


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
