"""`microvlm-bench report --html`: saved documents as one page that needs no network, no script and no other file.

Tables are those of the terminal and of Markdown (`bench.report`); charts and pictures come beside them. Every text of a
document is escaped: it may be a stranger's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import msgspec

from microvlm.bench.attention.attention_records import AttentionReport
from microvlm.bench.equivalence.equivalence_records import EquivalenceReport
from microvlm.bench.gates.gate_tables import history
from microvlm.bench.gates.metric_path import MissingMetric, look_up
from microvlm.bench.gates.result_store import StoredResult, read_store
from microvlm.bench.page.gallery import gallery
from microvlm.bench.page.page_charts import Chart, charts_of, history_chart, size_and_quality
from microvlm.bench.page.page_style import STYLE
from microvlm.bench.report import LARGEST_REPORT, READERS, parse_report
from microvlm.bench.tables import Report, Rows
from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.formats import documents

_LONG = ("files", "examples")
"""Tables that are folded away until a reader asks for them."""
_HISTORY_PHASES = ("vision", "decode", "end_to_end")
_ORDER = {kind: number for number, kind in enumerate(READERS)}


@dataclass(frozen=True)
class _Saved:
    """One document, read and rendered."""

    name: str
    kind: str
    document: dict[str, Any]
    report: Report


def html_page(paths: Sequence[Path], store: Path | None = None) -> str:
    """The page of saved documents, or of all in a folder, and of a store's history. Raises UserError."""
    saved = sorted((_read(path) for path in _files(paths)), key=lambda each: (_ORDER[each.kind], each.name))
    if not saved:
        raise UserError("there is no document to show: give files of -o, or a folder that holds some.")
    pairs = [(each.kind, each.document) for each in saved]
    sections: list[tuple[str, str, str]] = []
    pictures = gallery(
        (msgspec.convert(document, EquivalenceReport) for kind, document in pairs if kind == "equivalence"),
        (msgspec.convert(document, AttentionReport) for kind, document in pairs if kind == "attention"),
    )
    if pictures:
        sections.append(("pictures", "Pictures, answers and attention", pictures))
    overall = size_and_quality(pairs)
    if overall is not None:
        sections.append(("size", "Size and quality", _figure(overall)))
    if store is not None:
        sections.append(("history", "History", _history(read_store(store), store.name)))
    drawn: set[str] = set()
    for number, each in enumerate(saved):
        sections.append((f"d{number}", f"{each.kind}: {each.name}", _document(each, number, drawn)))
    return _page(sections)


def _files(paths: Sequence[Path]) -> list[Path]:
    """Files as they are; of folders the documents in them, other JSON files left out."""
    files: list[Path] = []
    for path in paths:
        files += (
            [file for file in sorted(path.glob("*.json")) if _is_report(file)] if path.is_dir() else [path]
        )
    return list(dict.fromkeys(files))


class _Head(msgspec.Struct, frozen=True):
    report: Any = None


def _is_report(path: Path) -> bool:
    try:
        kind = documents.parse(documents.read_file(path, LARGEST_REPORT), _Head, path, "leave it out").report
    except UserError:
        return False
    return isinstance(kind, str) and kind in READERS


def _read(path: Path) -> _Saved:
    try:
        content = documents.read_file(path, LARGEST_REPORT)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: save a report with -o first.") from None
    report = parse_report(content, str(path))
    document = json.loads(content.decode("utf-8-sig"))
    return _Saved(path.stem, document["report"], document, report)


def _document(saved: _Saved, number: int, drawn: set[str]) -> str:
    """A document's section; `drawn` holds the charts that stand in the page already, as several documents' may."""
    parts = [f"<p><strong>{escape(saved.report.head)}</strong></p>"]
    figures = map(_figure, charts_of(saved.kind, saved.document))
    new = [figure for figure in figures if figure not in drawn]
    drawn.update(new)
    parts += new
    for place, table in enumerate(saved.report.tables):
        label = f"{saved.name}: {table.title}"
        shown = _table(table.rows, f"{label} ({number + 1}.{place + 1})")
        title = escape(table.title)
        if table.name in _LONG:
            parts.append(f"<details><summary>{title}</summary>{shown}</details>")
        else:
            parts.append(f"<h3>{title}</h3>{shown}")
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in saved.report.remarks)
    return "".join([*parts, f"<ul>{remarks}</ul>" if remarks else ""])


def _history(results: Sequence[StoredResult], name: str) -> str:
    """All results as a table; times of `run` as curves, one a backend and phase, of each model."""
    parts = []
    series: dict[str, dict[str, list[float]]] = {}
    for result in results:
        if result.kind != "run":
            continue
        for entry in result.document.get("results", []):
            for phase in _HISTORY_PHASES:
                try:
                    value = look_up(entry, f"phases.{phase}.median_ms")
                except MissingMetric:
                    continue
                if isinstance(value, int | float) and value > 0:
                    own = series.setdefault(str(entry.get("model")), {})
                    own.setdefault(f"{entry.get('label')}, {phase}", []).append(float(value))
    for model, lines in series.items():
        longer = {label: values for label, values in lines.items() if len(values) > 1}
        if longer:
            parts.append(_figure(history_chart(f"Times of {printable(model)}, measured", longer)))
    rows = [[printable(cell) for cell in row] for row in history(results, ())]
    return "".join([*parts, _table(rows, f"results in {name}")])


def _figure(chart: Chart) -> str:
    caption, svg = chart
    # Scrolls where a screen is narrower than the chart's words are readable. Named by its title, the first element; a
    # group, because names of landmarks must differ, and titles of charts need not.
    name = svg.partition("<title>")[2].partition("</title>")[0]
    card = f'<div class="scroll chart" tabindex="0" role="group" aria-label="{name}">{svg}</div>'
    return f"<figure>{card}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(rows: Rows, label: str) -> str:
    """A table that scrolls by itself on a narrow screen, by keyboard too."""
    head, *body = rows
    # A cell without words heads nothing.
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' if cell else "<td></td>" for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(line[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in line[1:])}</tr>'
        for line in body
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _page(sections: Sequence[tuple[str, str, str]]) -> str:
    links = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in sections)
    bodies = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{escape(title)}</h2>{body}</section>'
        for key, title, body in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:"><title>MicroVLM: measurements</title>'
        f"<style>{STYLE}</style></head><body><header><h1>MicroVLM: measurements</h1>"
        "<p>Every figure is of a saved document; below each stands where it was measured. "
        "<em>Predicted</em> means calculated, not measured.</p></header>"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav><main>{bodies}</main></body></html>\n'
    )
