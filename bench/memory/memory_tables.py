"""The document of `memory` as tables: one model, or several side by side. Reads JSON, measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from microvlm.bench.tables import Report, Table

Rows = list[list[str]]
Figures = list[tuple[str, str]]
"""Label and value, one a line of a table."""


def report(document: dict[str, Any]) -> Report:
    """The report of one model, or of several as columns."""
    parts = document.get("subjects", [document])
    heads = [
        f"episodic memory of {part['provenance']['model']['name']} on {part['backend']}: {part['slots']} slots"
        for part in parts
    ]
    remarks = []
    tables = []
    scored = [part for part in parts if "recall" in part]
    for number, part in enumerate(scored):
        title = "recall, facts written once and asked for with another view"
        several = len(parts) > 1
        name = f"recall-{number + 1}" if several else "recall"
        tables.append(Table(name, f"{title}: {part['label']}" if several else title, _recall(part["recall"])))
    if scored:
        near, crowded = "after one fact", "beside many facts"
        title = "neighbours whose answer stays {}, by kind"
        tables += [
            Table("edits", "edits, forgetting, scope", _columns(scored, _figures)),
            Table("neighbours", title.format(near), _columns(scored, _neighbours)),
            Table("neighbours-crowded", title.format(crowded), _columns(scored, _crowded)),
        ]
        remarks.append(f"a guess among the names is right in {scored[0]['chance']:.3f} of the cases")
    tuned = [part for part in scored if "tuning" in part]
    if tuned:
        title = "one fact written, or trained into the decoder"
        tables.append(Table("tuning", title, _columns(tuned, _tuning)))
    tables += [
        Table("latency", "time, ms (median)", _columns(parts, _latencies)),
        Table("cost", "cost", _costs(parts)),
    ]
    return Report("; ".join(heads), tables, remarks)


def _columns(parts: Sequence[dict[str, Any]], figures: Callable[[dict[str, Any]], Figures]) -> Rows:
    """One column for each model; all have the same lines."""
    columns = [dict(figures(part)) for part in parts]
    labels = dict.fromkeys(label for column in columns for label in column)
    head = ["", "value"] if len(parts) == 1 else ["", *(part["label"] for part in parts)]
    return [head, *([label, *(column.get(label, "-") for column in columns)] for label in labels)]


def _recall(rows: list[dict[str, Any]]) -> Rows:
    table = [
        [
            *("facts", "times", "memories", "recall", "95 %"),
            *("memory reset", "reset, gate open", "reading", "1-NN of latents", "in one memory"),
        ]
    ]
    for row in rows:
        cells = [
            f"{row[name]:.3f}" for name in ("control", "control_gate_open", "reading", "nearest_neighbour")
        ]
        single = f"{row['single']:.3f}" if "single" in row else "-"
        counts = [*(str(row[name]) for name in ("facts", "trials", "memories")), f"{row['accuracy']:.3f}"]
        table.append([*counts, _interval(row["ci95"]), *cells, single])
    return table


def _figures(document: dict[str, Any]) -> Figures:
    other, sequential, drift = (document[name] for name in ("other_vendor", "sequential", "drift"))
    edit, forget, gate = (document[name] for name in ("edit", "forget", "gate"))
    retention = f"retention after {sequential['edits']} edits of {sequential['facts']} facts"
    return [
        (f"another vendor's drawing, {other['facts']} facts", _share(other["recall"])),
        ("another vendor's drawing, 1-NN of latents", _share(other["nearest_neighbour"])),
        ("edit: efficacy", _with_interval(edit, "efficacy")),
        ("edit: paraphrase", _with_interval(edit, "paraphrase")),
        *(
            (f"edit: {name.replace('_', ' ')}, {facts}", _with_interval(table, name))
            for facts, table in _edits(edit)
            for name in ("neighbourhood", "neighbourhood_without_gate")
        ),
        *((f"forget: {name}", _with_interval(forget, name)) for name in ("forgotten", "retained", "attack")),
        *((f"gate: {name}", _with_interval(gate, name)) for name in ("auroc", "eer")),
        *(
            (f"gate: {score} against {kind.replace('_', ' ')}", _share(scores[score]))
            for kind, scores in gate["kinds"].items()
            for score in ("auroc", "eer")
        ),
        *((f"gate: residual {name}", _share(gate[f"residual_{name}"])) for name in ("auroc", "eer")),
        (retention, _share(sequential["retention"])),
        ("drift of the state then", f"{sequential['drift']:.1e}"),
        (f"float32 against float64 after {drift['steps']} mixed steps", f"{drift['float32_vs_float64']:.1e}"),
        ("the same, never built anew", f"{drift['without_rebuilds']:.1e}"),
        ("the same, built anew from the log", f"{drift['after_rebuild']:.1e}"),
        ("slots in effect", f"{document['addressing']['effective_slots']:.1f} of {document['slots']}"),
    ]


def _edits(edit: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The two tables of neighbours with how many facts were written."""
    crowded = edit["crowded"]
    return [("one fact written", edit), (f"{crowded['facts_written']} facts written", crowded)]


def _neighbours(document: dict[str, Any]) -> Figures:
    return _kinds(document["edit"]["neighbours"])


def _crowded(document: dict[str, Any]) -> Figures:
    return _kinds(document["edit"]["crowded"]["neighbours"])


def _kinds(neighbours: dict[str, dict[str, Any]]) -> Figures:
    figures: Figures = []
    for name, kind in neighbours.items():
        words = name.replace("_", " ")
        figures += [
            (f"{words}, {kind['cases']} cases", f"{kind['kept']:.3f} ({_interval(kind['ci95'])})"),
            (f"{words}, without gate", f"{kind['kept_without_gate']:.3f}"),
        ]
    return figures


def _tuning(document: dict[str, Any]) -> Figures:
    tuning = document["tuning"]
    figures: Figures = [
        (f"written, ms (median of {tuning['facts']} facts)", f"{tuning['write_ms']:.2f}"),
        ("written on torch, ms", f"{tuning['write_torch_ms']:.2f}"),
        ("trained, ms", f"{tuning['tuning_ms']:.0f}"),
        ("trained, steps", f"{tuning['steps']:.0f}"),
        ("trained / written, times as long", f"{tuning['tuning_over_write']:.0f}"),
    ]
    for name in ("written", "tuned"):
        word = "trained" if name == "tuned" else name
        figures += [
            (f"{word}: answered right", _share(tuning[name])),
            (f"{word}: paraphrase", _share(tuning[f"{name}_paraphrase"])),
            (f"{word}: neighbours' answers that stay", _share(tuning[f"{name}_neighbourhood"])),
        ]
    return figures


def _latencies(document: dict[str, Any]) -> Figures:
    return [(name.replace("_", " "), f"{value:.3f}") for name, value in document["latency_ms"].items()]


def _costs(parts: Sequence[dict[str, Any]]) -> Rows:
    sizes = list({size["name"]: size for part in parts for size in part["costs"]["sizes"]}.values())
    measured = ["measured, time"] if len(parts) == 1 else [f"measured: {part['label']}" for part in parts]
    table = [
        ["", *measured, *(f"predicted, multiplications: {size['name']}" for size in sizes), "bar, full size"]
    ]
    labels = ("read + write, of an answer of 50 tokens", "encode, of the prefill")
    for index, label in enumerate(labels):
        part_bars = [part["costs"]["bars"][index] for part in parts]
        cells = [
            _percent(bar["value"]) + {True: ", met", False: ", NOT MET", None: ""}[bar["met"]]
            for bar in part_bars
        ]
        counted = [_percent(size[f"predicted_{part_bars[0]['name']}"]) for size in sizes]
        table.append([label, *cells, *counted, f"<= {_percent(part_bars[0]['at_most'])}"])
    return table


def _interval(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3f}-{ends[1]:.3f}"


def _with_interval(table: dict[str, Any], name: str) -> str:
    """A share and, where the table has one, its 95 % interval."""
    ends = table.get(f"{name}_ci95")
    return _share(table[name]) + (f" ({_interval(ends)})" if ends else "")


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
