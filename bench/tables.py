"""Tables of strings, and a report made of them, as text for a terminal or as Markdown. Knows no measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from microvlm.escaping import printable

Rows = Sequence[Sequence[str]]
"""The first row is the head."""
TEXT_COLUMNS = ("source",)
"""Heads of columns of words, which are aligned left; numbers are aligned right."""

LONGEST_CELL = 500
"""Characters of a cell that are shown: text pads every cell of a column to its longest."""


class Table(NamedTuple):
    """One table. `name` is short and stays the same, so that a page can ask for it; `title` is for readers."""

    name: str
    title: str
    rows: Rows


class Report(NamedTuple):
    """A document in the order in which it is read. `remarks` are sentences."""

    head: str
    tables: Sequence[Table]
    remarks: Sequence[str]

    def printable(self) -> Report:
        """The same without control characters, and with long cells cut: a document may hold any text."""
        tables = [
            Table(table.name, printable(table.title), [[_cell(cell) for cell in row] for row in table.rows])
            for table in self.tables
        ]
        return Report(printable(self.head), tables, list(map(printable, self.remarks)))

    def text(self) -> str:
        """Renders for a terminal: columns padded with spaces."""
        parts = [self.head, *(f"{table.title}\n{padded(table.rows)}" for table in self.tables)]
        return "\n\n".join(part for part in [*parts, "\n".join(self.remarks)] if part)

    def markdown(self) -> str:
        parts = [f"**{self.head}**", *(f"### {table.title}\n\n{piped(table.rows)}" for table in self.tables)]
        return "\n\n".join(part for part in [*parts, bullets(self.remarks)] if part) + "\n"


def _cell(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= LONGEST_CELL else f"{shown[: LONGEST_CELL - 1]}…"


def padded(rows: Rows) -> str:
    """Columns padded with spaces, the first aligned left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [
            cell.ljust(width) if head in TEXT_COLUMNS else cell.rjust(width)
            for head, cell, width in zip(rows[0][1:], row[1:], widths[1:], strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def piped(rows: Rows) -> str:
    """A Markdown table."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---", *("---" if name in TEXT_COLUMNS else "---:" for name in head[1:])], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(sentences: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)
