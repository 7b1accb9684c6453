"""The records of a report of `microvlm-bench compare`, and of trials of it."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.records import Figure, PositiveFigure, Provenance
from microvlm.formats.documents import Count

Two = Annotated[list[PositiveFigure], Meta(min_length=2, max_length=2)]


class ComparedSide(msgspec.Struct, frozen=True):
    """What one side ran."""

    model: str
    backend: str
    path: str
    library: str | None = None
    """File name of another native library than the package's."""
    other_python: bool = False


class Outlying(msgspec.Struct, frozen=True):
    """Samples of one side that lie far from its others; they are in every figure."""

    count: Count
    samples: Count
    largest_ms: Figure


class Quantity(msgspec.Struct, frozen=True):
    """One quantity on both sides; `value`, `low`, `high` are of B / A, `medians` and others of A and B."""

    name: str
    unit: str
    medians: Two
    value: Figure
    low: Figure
    high: Figure
    verdict: str
    sentence: str
    outliers: Annotated[list[Outlying], Meta(min_length=2, max_length=2)]
    shares_of_ceiling: Annotated[list[Figure | None], Meta(min_length=2, max_length=2)] = msgspec.field(
        default_factory=lambda: [None, None]
    )


class ComparisonReport(msgspec.Struct, frozen=True):
    """The whole document. `pairs` and `rounds` are None where two saved documents were compared."""

    in_turns: bool
    verdict: str
    sentence: str
    a: ComparedSide
    b: ComparedSide
    margin: Figure
    level: Figure
    quantities: list[Quantity]
    provenance: Provenance
    pairs: Count | None = None
    rounds: Count | None = None
    energy_note: str | None = None
    remarks: list[str] = []
    samples_ms: dict[str, list[list[Two]]] = {}
    """Every sample in turns, by quantity: [pairs][samples] of A and B."""


class Trial(msgspec.Struct, frozen=True):
    """One comparison of which it is known whether there is a difference."""

    slowed: bool
    flagged: list[str]
    """Quantities with a real difference."""
    right: bool
    kernel_ratio: Figure
    """B / A of the slowed kernel."""
    largest_elsewhere: Figure
    """Largest |B / A - 1| of the phases."""


class TrialsReport(msgspec.Struct, frozen=True):
    """Many comparisons of a library with itself, and with a copy of which one kernel is slower on purpose."""

    trials: list[Trial]
    slowdown: Figure
    kernel: str
    pairs: Count
    rounds: Count
    margin: Figure
    most_wrong: Count
    provenance: Provenance
