"""The report of `python tests/fuzz` as tables: how many mutated files of each kind were right and how many refused."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.records import Figure, Provenance
from microvlm.bench.tables import Report, Table
from microvlm.formats.documents import Count


class MutatedKind(msgspec.Struct, frozen=True):
    """Mutants of one kind by what became of them; the last four are faults."""

    mutants: Count
    loaded: Count
    refused: Count
    defect: Count
    signal: Count
    slow: Count
    large: Count
    slowest_s: Figure
    largest_mb: Figure


class MutationReport(msgspec.Struct, frozen=True):
    """The document of kind `mutations`."""

    seed: int
    seconds_allowed: Figure
    megabytes_allowed: Figure
    kinds: Annotated[dict[str, MutatedKind], Meta(min_length=1, max_length=1000)]
    provenance: Provenance


def report(document: MutationReport) -> Report:
    heads = ["kind", "mutants", "right", "refused", "traceback or wrong", "signal", "too slow", "too large"]
    rows = [[*heads, "slowest, s", "peak RSS, MB"]]
    counts = [_counts(kind) for kind in document.kinds.values()]
    for (name, kind), numbers in zip(document.kinds.items(), counts, strict=True):
        figures = [f"{kind.slowest_s:.2f}", f"{kind.largest_mb:.0f}"]
        rows.append([name, *(f"{number:,}" for number in numbers), *figures])
    totals = [sum(numbers) for numbers in zip(*counts, strict=True)]
    slowest = max(kind.slowest_s for kind in document.kinds.values())
    largest = max(kind.largest_mb for kind in document.kinds.values())
    rows.append(["all", *(f"{total:,}" for total in totals), f"{slowest:.2f}", f"{largest:.0f}"])
    remarks = [
        f"seed {document.seed}; allowed: {document.seconds_allowed:g} s of processor time and "
        f"{document.megabytes_allowed:g} MB of resident memory, the program's own included"
    ]
    return Report(f"{totals[0]:,} mutated files", [Table("mutants", "mutated files by kind", rows)], remarks)


def _counts(kind: MutatedKind) -> list[int]:
    return [kind.mutants, kind.loaded, kind.refused, kind.defect, kind.signal, kind.slow, kind.large]
