"""The reports of `python tests/fuzz` and `python tests/kills` as tables.

How many mutated files of each kind were right and how many refused; and what was found after each writer was killed.
"""

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


class KilledWriter(msgspec.Struct, frozen=True):
    """Kills of one writer, and what a reader found after them; a kill that leaves anything else ends the program."""

    at_calls: Count
    at_random: Count
    found_old: Count
    found_new: Count
    with_leftovers: Count
    """Kills after which there were files for the next command to clean up, which it did."""


class KillReport(msgspec.Struct, frozen=True):
    """The document of kind `kills`."""

    seed: int
    writers: Annotated[dict[str, KilledWriter], Meta(min_length=1, max_length=100)]
    provenance: Provenance


def mutation_report(document: MutationReport) -> Report:
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


def kill_report(document: KillReport) -> Report:
    heads = [
        "writer",
        "before a system call",
        "at a random moment",
        "found old",
        "found new",
        "files to clean up",
    ]
    counts = [
        [each.at_calls, each.at_random, each.found_old, each.found_new, each.with_leftovers]
        for each in document.writers.values()
    ]
    rows = [heads]
    for name, numbers in zip(document.writers, counts, strict=True):
        rows.append([name, *(f"{number:,}" for number in numbers)])
    totals = [sum(numbers) for numbers in zip(*counts, strict=True)]
    rows.append(["all", *(f"{total:,}" for total in totals)])
    remarks = [
        f"seed {document.seed}; after each kill the next command worked and nothing was left behind it"
    ]
    return Report(f"{totals[0] + totals[1]:,} kills", [Table("kills", "kills by writer", rows)], remarks)
