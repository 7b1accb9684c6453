"""The document of `microvlm-bench run` as tables. Reads JSON, measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from microvlm.bench.speed.phases import PHASES
from microvlm.bench.tables import Report, Rows, Table


def report(document: dict[str, Any]) -> Report:
    ran = [entry for entry in document["results"] if entry["status"] == "ok"]
    emulated = [entry for entry in document["results"] if (entry.get("emulated") or {}).get("predicted_ms")]
    tables = []
    if ran or emulated:
        title = "time, ms: median (p90)" if ran else "no measured times"
        tables.append(Table("phases", title, _phase_rows(ran, emulated)))
    if ran:
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
    remarks += [sentence for entry in document["results"] for sentence in _emulation(entry)]
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


def _phase_rows(ran: Sequence[dict[str, Any]], emulated: Sequence[dict[str, Any]]) -> Rows:
    """Measured columns, then for each emulated backend instructions and predicted milliseconds, named so."""
    rows = [["phase", *(entry["label"] for entry in ran)]]
    for entry in emulated:
        rows[0] += [f"{entry['label']}: M instructions", f"{entry['label']}: predicted ms"]
    for phase in PHASES:
        label = f"{phase} (a token)" if phase == "decode" else phase
        row = [label, *(_time(entry["phases"].get(phase)) for entry in ran)]
        for entry in emulated:
            row += _prediction(entry["emulated"], phase)
        rows.append(row)
    return rows


def _time(phase: dict[str, Any] | None) -> str:
    return f"{phase['median_ms']:.2f} ({phase['p90_ms']:.2f})" if phase else "-"


def _prediction(emulated: dict[str, Any], phase: str) -> list[str]:
    if phase not in emulated["predicted_ms"]:
        return ["-", "-"]
    ends = [f"{emulated['predicted_ms'][phase][end]:.1f}" for end in ("low", "high")]
    return [f"{emulated['counted_instructions'][phase] / 1e6:.2f}", "-".join(dict.fromkeys(ends))]


def _emulation(entry: dict[str, Any]) -> list[str]:
    """Remarks on an emulated backend: the meaning of its columns, and the verdict on its equivalence."""
    emulated = entry.get("emulated")
    if not emulated:
        return []
    sentences = []
    if emulated["predicted_ms"]:
        sentences.append(
            f"{entry['label']}: no time of it was measured. Instructions are of {emulated['counts_from']}, of one "
            f"thread of a {emulated['cpu']}, with an image and 15 tokens of text; times are predicted from them for a "
            f"{emulated['board']}, at both ends of its memory bandwidth, and may be wrong by a factor of two"
        )
    compared = emulated["equivalence"]
    if compared:
        core, against = emulated["cpu"], compared["against"]
        sentence = f"{entry['label']} on an emulated {core} against {against}: {compared['verdict']}"
        if compared["sums"] is not None:
            equal = compared["sums"] - compared["sums_differing"]
            sentence += f", {equal:,} of {compared['sums']:,} integer sums equal"
        sentences.append(sentence)
    return sentences


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
        ("of which the model's, MB", "anonymous_of_model_bytes"),
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
