"""The document of `memory` as tables. Reads JSON, measures nothing."""

from __future__ import annotations

from typing import Any

Rows = list[list[str]]


def tables(document: dict[str, Any]) -> tuple[str, list[tuple[str, Rows]], list[str]]:
    """(head, titled tables whose first rows are heads, remarks)."""
    name = document["provenance"]["model"]["name"]
    head = f"episodic memory of {name} on {document['backend']}: {document['slots']} slots"
    sections, remarks = [], []
    if "recall" in document:
        sections += [
            ("recall, facts written once and asked for with another view", _recall(document["recall"])),
            ("edits, forgetting, scope", _figures(document)),
        ]
        remarks.append(f"a guess among the names is right in {document['chance']:.3f} of the cases")
    sections += [
        ("time, ms (median)", _pairs(document["latency_ms"], "{:.3f}")),
        ("cost", _costs(document["costs"])),
    ]
    return head, sections, remarks


def _recall(rows: list[dict[str, Any]]) -> Rows:
    table = [
        ["facts", "memories", "recall", "95 %", "memory reset", "reading", "1-NN of codes", "in one memory"]
    ]
    for row in rows:
        low, high = row["ci95"]
        cells = [f"{row[name]:.3f}" for name in ("control", "reading", "nearest_neighbour")]
        single = f"{row['single']:.3f}" if "single" in row else "-"
        interval = f"{low:.3f}-{high:.3f}"
        table.append(
            [str(row["facts"]), str(row["memories"]), f"{row['accuracy']:.3f}", interval, *cells, single]
        )
    return table


def _figures(document: dict[str, Any]) -> Rows:
    table = [["", "share"]]
    for part in ("edit", "forget", "gate"):
        table += [
            [f"{part}: {name.replace('_', ' ')}", _share(value)] for name, value in document[part].items()
        ]
    sequential = document["sequential"]
    label = f"retention after {sequential['edits']} edits of {sequential['facts']} facts"
    return [
        *table,
        [label, _share(sequential["retention"])],
        ["drift of the state then", f"{sequential['drift']:.1e}"],
    ]


def _costs(document: dict[str, Any]) -> Rows:
    shares = ("read_write_share_of_answer", "encode_share_of_prefill")
    labels = ("read + write, of an answer of 50 tokens", "encode, of the prefill")
    sizes = document["sizes"]
    table = [["", "measured, time", *(f"predicted, multiplications: {size['name']}" for size in sizes)]]
    for share, label in zip(shares, labels, strict=True):
        counted = [f"{100 * size[f'predicted_{share}']:.2f} %" for size in sizes]
        table.append([label, f"{100 * document['measured'][share]:.2f} %", *counted])
    return table


def _pairs(values: dict[str, float], form: str) -> Rows:
    return [["", "value"], *([name.replace("_", " "), form.format(value)] for name, value in values.items())]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
