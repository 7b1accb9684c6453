"""Markdown pages whose tables are rendered from saved reports, so that a number in a page is always a measured one.

A block in a page names a JSON document, relative to the page's folder, and what of it is shown:

    <!-- report results/run-nano.json section=phases columns="phase; ort" rows="prefill; decode (a token)" -->
    | phase | ort |
    ...
    <!-- end -->

`section` is a table's name, or `head`, `remarks` or `provenance`; without it the whole report is shown. `columns`
and `rows` choose and order columns by their heads, and rows by their first cells. Lines inside code fences are
not blocks.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from microvlm.atomic import write_file
from microvlm.bench.report import report_of_file
from microvlm.bench.tables import Report, Rows, bullets, piped
from microvlm.errors import UserError

END = "<!-- end -->"
_BEGIN = re.compile(r"<!-- report (.+) -->")
_OPTIONS = ("section", "columns", "rows")
_PROSE = ("head", "remarks", "provenance")


@dataclass(frozen=True)
class Difference:
    """A block that is not what its document gives."""

    page: Path
    line: int
    """Number of the block's first line, from 1."""
    block: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.block} differs from its report"


def pages_in(paths: Sequence[Path]) -> list[Path]:
    """Markdown files, and those below folders. Raises UserError for a path that is neither."""
    pages: list[Path] = []
    for path in paths:
        if path.is_dir():
            pages += sorted(path.rglob("*.md"))
        elif path.is_file():
            pages.append(path)
        else:
            raise UserError(f"{path} does not exist: give Markdown files or folders of them.")
    return list(dict.fromkeys(pages))


def rewrite(
    pages: Sequence[Path],
    check: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Difference]:
    """Renders every block of the pages anew and returns those that were different; `check` writes nothing.

    `progress` is called with the number of finished pages and of all.

    Raises UserError, with page and line, for a block that cannot be rendered.
    """
    differences = []
    for number, page in enumerate(pages, 1):
        text = page.read_bytes().decode()  # keeps the page's line ends
        rendered, changed = render_page(text, page)
        differences += changed
        if changed and not check:
            write_file(page, rendered)
        progress(number, len(pages))
    return differences


def render_page(text: str, page: Path) -> tuple[str, list[Difference]]:
    """The text with every block rendered, in its own line ends, and the blocks that changed. Raises UserError."""
    lines: list[str] = []
    differences = []
    rest = list(enumerate(text.split("\n"), 1))
    fence = ""
    while rest:
        number, line = rest.pop(0)
        lines.append(line)
        mark = re.match(r" *(```+|~~~+)", line)
        if mark and (not fence or line.strip() == fence):
            fence = "" if fence else mark[1]
        begin = None if fence else _BEGIN.fullmatch(line.strip())
        if begin is None:
            continue
        body, end = _body(rest, f"{page}:{number}")
        return_character = "\r" if line.endswith("\r") else ""
        try:
            markdown = render_block(begin[1], page.parent).removesuffix("\n")
        except UserError as error:
            raise UserError(f"{page}:{number}: {error}") from None
        rendered = [row + return_character for row in markdown.split("\n")] if markdown else []
        if body != rendered:
            differences.append(Difference(page, number, begin[1]))
        lines += [*rendered, end]
    return "\n".join(lines), differences


def render_block(block: str, folder: Path) -> str:
    """Markdown of one block: `FILE [section=NAME] [columns="A; B"] [rows="A; B"]`. Raises UserError."""
    try:
        name, *pairs = shlex.split(block)
    except ValueError as error:
        raise UserError(f"the block '{block}' cannot be read: {error}.") from None
    options = dict(pair.partition("=")[::2] for pair in pairs)
    unknown = next((option for option in options if option not in _OPTIONS), None)
    if unknown is not None:
        raise UserError(f"a block has no option '{unknown}'; it has {', '.join(_OPTIONS)}.")
    report = report_of_file(folder / name)
    section = options.pop("section", None)
    if section is not None and section not in _PROSE:
        return piped(_chosen(_table(report, section, name), options))
    if options:
        raise UserError("columns and rows choose from a table: give its name as section.")
    prose = {
        None: report.markdown().rstrip("\n"),
        "head": report.head,
        "remarks": bullets(report.remarks[:-1]),
        "provenance": f"Made on: {report.remarks[-1]}",
    }
    return prose[section]


def _body(rest: list[tuple[int, str]], place: str) -> tuple[list[str], str]:
    """The lines up to the block's end, and that line; takes them from `rest`. Raises UserError without an end."""
    body: list[str] = []
    while rest:
        _, line = rest.pop(0)
        if line.strip() == END:
            return body, line
        if _BEGIN.fullmatch(line.strip()):
            break
        body.append(line)
    raise UserError(f"{place}: this block has no end: write '{END}' on a line of its own after it.")


def _table(report: Report, section: str, name: str) -> Rows:
    tables = {table.name: table.rows for table in report.tables}
    if section not in tables:
        raise UserError(f"{name} has no section '{section}'; it has {', '.join([*tables, *_PROSE])}.")
    return tables[section]


def _chosen(rows: Rows, options: dict[str, str]) -> Rows:
    lines = list(range(1, len(rows)))
    columns = list(range(len(rows[0])))
    if "columns" in options:
        columns = [_index(name, rows[0], "column") for name in _names(options["columns"])]
    if "rows" in options:
        firsts = [row[0] for row in rows[1:]]
        lines = [1 + _index(name, firsts, "row") for name in _names(options["rows"])]
    return [[rows[line][column] for column in columns] for line in (0, *lines)]


def _names(option: str) -> list[str]:
    return [name.strip() for name in option.split(";")]


def _index(name: str, names: Sequence[str], kind: str) -> int:
    if name not in names:
        raise UserError(f"there is no {kind} '{name}'; there are: {'; '.join(names)}.")
    return list(names).index(name)
