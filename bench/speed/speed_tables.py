"""The document of `microvlm-bench run` as tables. Reads JSON, measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from microvlm.bench.speed.phases import PHASES
from microvlm.bench.tables import Report, Rows, Table


def report(document: dict[str, Any]) -> Report:
    ran = [entry for entry in document["results"] if entry["status"] == "ok"]
    tables = []
    if ran:
        tables.append(Table("phases", "time, ms: median (p90)", _phase_rows(ran)))
        tables.append(Table("memory", "speed and memory", _memory_rows(ran)))
    ratios = document.get("ratios", [])
    if ratios:
        tables.append(Table("ratios", "ratio of medians [95 % interval]", _ratio_rows(ratios)))
    models = document["provenance"]["models"]
    tables.append(Table("files", "files, bytes", _file_rows(models)))
    remarks = [
        f"{entry['label']} {entry['status']}: {entry['reason']}"
        for entry in document["results"]
        if entry["reason"]
    ]
    if ran:
        remarks.append(_ceiling(document, ran[0]))
    head = "; ".join(f"{model['name']}: {model['total_bytes'] / 1e6:.2f} MB" for model in models)
    return Report(head, tables, remarks)


def _ceiling(document: dict[str, Any], entry: dict[str, Any]) -> str:
    gigabytes = document["ceiling"]["read_bandwidth_bytes_per_s"] / 1e9
    return (
        f"ceiling: one core reads {gigabytes:.1f} GB/s from memory "
        f"here and a token reads {entry['weight_bytes_per_token'] / 1e6:.2f} MB of weights; weights that fit a "
        "cache may pass it, and calls of small operators stay far below it"
    )


def _file_rows(models: Sequence[dict[str, Any]]) -> Rows:
    names = {name for model in models for name in model["files"]}
    ordered = sorted(names, key=lambda name: -max(model["files"].get(name, 0) for model in models))
    rows = [["file", *(model["name"] for model in models)]]
    return rows + [[name, *(f"{model['files'].get(name, 0):,}" for model in models)] for name in ordered]


def _phase_rows(ran: Sequence[dict[str, Any]]) -> Rows:
    rows = [["phase", *(entry["label"] for entry in ran)]]
    for phase in PHASES:
        cells = [entry["phases"].get(phase) for entry in ran]
        label = f"{phase} (a token)" if phase == "decode" else phase
        rows.append([label, *(f"{c['median_ms']:.2f} ({c['p90_ms']:.2f})" if c else "-" for c in cells)])
    return rows


def _memory_rows(ran: Sequence[dict[str, Any]]) -> Rows:
    def megabytes(entry: dict[str, Any], field: str) -> str:
        return "-" if entry.get(field) is None else f"{entry[field] / 1e6:.1f}"

    rows = [["", *(entry["label"] for entry in ran)]]
    rows.append(["decode, tokens/s", *(f"{entry['decode_tokens_per_s'] or 0:.1f}" for entry in ran)])
    rows.append(
        ["share of ceiling", *(f"{100 * (entry['decode_share_of_ceiling'] or 0):.1f} %" for entry in ran)]
    )
    for label, field in (
        ("peak RSS, MB", "peak_rss_bytes"),
        ("anonymous, MB", "anonymous_bytes"),
        ("of it the model's, MB", "anonymous_of_model_bytes"),
        ("file-backed, MB", "file_backed_bytes"),
        ("PSS, MB", "pss_bytes"),
    ):
        rows.append([label, *(megabytes(entry, field) for entry in ran)])
    rows.append(["path", *(str(entry["path"]) for entry in ran)])
    return rows


def _ratio_rows(ratios: Sequence[dict[str, Any]]) -> Rows:
    rows = [["phase", "backends", "ratio"]]
    for entry in ratios:
        interval = f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"
        rows.append([entry["phase"], f"{entry['backend']} / {entry['against']}", interval])
    return rows
