"""Tables of personalisation: named concepts against strangers, and the curve of many facts. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

from microvlm.bench.memory.memory_records import ConceptRow, Part, Recognition, StreamRow
from microvlm.bench.tables import Rows, Table


def personalisation_tables(parts: Sequence[Part]) -> list[Table]:
    """Two tables for each model that has them."""
    tables = []
    for number, part in enumerate(parts, 1):
        name, title = (f"-{number}", f": {part.label}") if len(parts) > 1 else ("", "")
        if part.concepts:
            head = "named concepts and strangers, shown in another view"
            tables.append(Table(f"concepts{name}", head + title, _concepts(part.concepts)))
        if part.stream:
            head = "facts written one after another, each fourth write followed by forgetting one"
            tables.append(Table(f"stream{name}", head + title, _stream(part.stream)))
    return tables


def _concepts(rows: Sequence[ConceptRow]) -> Rows:
    table = [["concepts", "strangers", "", "weighted accuracy", "positives named", "strangers declined"]]
    for row in rows:
        methods = [
            ("memory", row.memory),
            (f"nearest features, above {row.threshold:.3f}", row.nearest_features),
        ]
        for method, scores in methods:
            table.append([f"{row.concepts}", row.strangers, method, *_recognition(row, scores)])
        difference = row.difference
        interval = f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
        table.append(
            [f"{row.concepts}", row.strangers, f"difference, {difference.verdict}", interval, "", ""]
        )
    return table


def _recognition(row: ConceptRow, scores: Recognition) -> list[str]:
    weighted = scores.weighted_accuracy
    return [
        f"{weighted.value:.3f} [{weighted.low:.3f}, {weighted.high:.3f}]",
        f"{scores.positives:.3f} of {row.positives}",
        f"{scores.negatives:.3f} of {row.negatives}",
    ]


def _stream(rows: Sequence[StreamRow]) -> Rows:
    table = [
        [
            *("writes", "live", "memories", "recall of live facts", "wrong text", "forgotten stay away"),
            *("write, ms", "read, ms", "forget, ms", "states, KB", "file, KB"),
        ]
    ]
    for row in rows:
        low, high = row.recall_ci95
        table.append(
            [
                *(str(row.writes), str(row.live), str(row.memories)),
                f"{row.recall:.3f} [{low:.3f}, {high:.3f}]",
                f"{row.wrong:.3f}",
                "-" if row.forgotten is None else f"{row.forgotten:.3f} of {row.forgotten_asked}",
                *("-" if ms is None else f"{ms:.2f}" for ms in (row.write_ms, row.read_ms, row.forget_ms)),
                *(f"{count / 1000:.0f}" for count in (row.state_bytes, row.file_bytes)),
            ]
        )
    return table
