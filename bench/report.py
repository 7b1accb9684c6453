"""Documents of the commands as text tables for people and as Markdown. Reads JSON, measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from microvlm.bench.full import full_bench
from microvlm.bench.kernels import kernel_tables as kernel_tables
from microvlm.bench.memory.memory_tables import tables as memory_tables
from microvlm.bench.pi import pi_tables as pi_tables
from microvlm.bench.speed.phases import PHASES
from microvlm.errors import UserError

Rows = Sequence[Sequence[str]]
Section = tuple[str, Rows]
"""A title and a table whose first row is its head."""
SENTENCES = "source"
"""Head of a column that holds words and not numbers: it starts at its left edge."""


def text(document: dict[str, Any]) -> str:
    """For a terminal: columns padded with spaces."""
    head, sections, remarks = _read(document)
    parts = [head, *(f"{title}\n{_padded(rows)}" for title, rows in sections), "\n".join(remarks)]
    return "\n\n".join(part for part in parts if part)


def markdown(document: dict[str, Any]) -> str:
    head, sections, remarks = _read(document)
    parts = [f"**{head}**", *(f"### {title}\n\n{_piped(rows)}" for title, rows in sections)]
    parts += ["\n".join(f"- {remark}" for remark in remarks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _read(document: dict[str, Any]) -> tuple[str, list[Section], list[str]]:
    if "target" in document:
        head, tables, remarks = pi_tables.sections(document)
        return head, list(tables), [*remarks, _where(document)]
    if "verdict" in document:
        return _equivalence(document)
    if "results" in document:
        return _run(document)
    if "full" in document:
        head, tables, remarks = full_bench.section(document)
        return head, list(tables), [*remarks, _where(document)]
    if "rows" in document:
        head, tables, remarks = kernel_tables.sections(document)
        return head, list(tables), [*remarks, _where(document)]
    if "costs" in document or "subjects" in document:
        head, sections, remarks = memory_tables(document)
        return head, list(sections), [*remarks, _where(document)]
    raise UserError(
        "this is no report of microvlm-bench: it has no 'results', 'verdict', 'rows', 'full', 'costs' or 'target'."
    )


def _run(document: dict[str, Any]) -> tuple[str, list[Section], list[str]]:
    ran = [entry for entry in document["results"] if entry["status"] == "ok"]
    sections: list[Section] = []
    if ran:
        sections.append(("time, ms: median (p90)", _phase_table(ran)))
        sections.append(("speed and memory", _memory_table(ran)))
    ratios = document.get("ratios", [])
    if ratios:
        sections.append(("ratio of medians [95 % interval]", _ratio_table(ratios)))
    models = document["provenance"]["models"]
    sections.append(("files, bytes", _file_table(models)))
    remarks = [
        f"{entry['label']} {entry['status']}: {entry['reason']}"
        for entry in document["results"]
        if entry["reason"]
    ]
    if ran:
        remarks.append(
            f"ceiling: one core reads {document['ceiling']['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s from memory "
            f"here and a token reads {ran[0]['weight_bytes_per_token'] / 1e6:.2f} MB of weights; weights that fit a "
            "cache may pass it, and calls of small operators stay far below it"
        )
    head = "; ".join(f"{model['name']}: {model['total_bytes'] / 1e6:.2f} MB" for model in models)
    return head, sections, [*remarks, _where(document)]


def _file_table(models: Sequence[dict[str, Any]]) -> Rows:
    names = {name for model in models for name in model["files"]}
    ordered = sorted(names, key=lambda name: -max(model["files"].get(name, 0) for model in models))
    rows = [["file", *(model["name"] for model in models)]]
    return rows + [[name, *(f"{model['files'].get(name, 0):,}" for model in models)] for name in ordered]


def _phase_table(ran: Sequence[dict[str, Any]]) -> Rows:
    rows = [["phase", *(entry["label"] for entry in ran)]]
    for phase in PHASES:
        cells = [entry["phases"].get(phase) for entry in ran]
        label = f"{phase} (a token)" if phase == "decode" else phase
        rows.append([label, *(f"{c['median_ms']:.2f} ({c['p90_ms']:.2f})" if c else "-" for c in cells)])
    return rows


def _memory_table(ran: Sequence[dict[str, Any]]) -> Rows:
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


def _ratio_table(ratios: Sequence[dict[str, Any]]) -> Rows:
    rows = [["phase", "backends", "ratio"]]
    for entry in ratios:
        interval = f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"
        rows.append([entry["phase"], f"{entry['backend']} / {entry['against']}", interval])
    return rows


def _equivalence(document: dict[str, Any]) -> tuple[str, list[Section], list[str]]:
    reference, candidate = document["reference"], document["candidate"]
    head = (
        f"{document['verdict']}: {candidate['model']} on {candidate['backend']} against "
        f"{reference['model']} on {reference['backend']} - {document['question']}"
    )
    rows = [["", "free-running", "replayed"], *_agreement_rows(document)]
    accuracy = [["answers right", "samples", "reference", "candidate"]]
    accuracy += [
        [kind, str(row["samples"]), f"{row['reference']:.3f}", f"{row['candidate']:.3f}"]
        for kind, row in document["accuracy"].items()
    ]
    remarks = list(document["reasons"])
    if document["replay"].get("unavailable"):
        remarks.append(document["replay"]["unavailable"])
    if "kernels" in candidate:
        remarks.append(
            f"quantised layers: reference {reference['kernels']}, candidate {candidate['kernels']}"
        )
    return head, [("agreement", rows), ("exact match", accuracy)], [*remarks, _where(document)]


def _agreement_rows(document: dict[str, Any]) -> list[list[str]]:
    replay = document["replay"]
    samples = document["samples"]
    rows = [
        [
            f"greedy answers equal, of {samples}",
            _share(document["greedy_match"]),
            _share(replay["greedy_match"]),
        ],
        [
            "logits, largest difference",
            _small(document["logits_max_abs_diff"]),
            _small(replay["logits_max_abs_diff"]),
        ],
        [f"top-1 agreement, {document['positions']} positions", _share(document["top1_agreement"]), "-"],
        ["KL mean / p99 / max, nats", _kl(document), "-"],
        ["memory drift, 20 steps", _small(document["memory_drift"]), _small(replay.get("memory_drift"))],
    ]
    if replay["codes"] is not None:
        rows += [
            [
                "integer sums",
                "-",
                f"{replay['sums'] - replay['sums_differing']:,} of {replay['sums']:,} equal",
            ],
            ["codes that differ", "-", f"{replay['codes_differing']:,} of {replay['codes']:,}"],
            ["largest step of a code", "-", str(replay["max_code_step"])],
            ["largest distance from a tie", "-", _small(replay["max_tie_distance"])],
        ]
    return rows


def _kl(document: dict[str, Any]) -> str:
    return " / ".join(_small(document[name]) for name in ("kl_mean", "kl_p99", "kl_max"))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _where(document: dict[str, Any]) -> str:
    facts = document["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    threads = facts["threads"] or "default"
    if isinstance(threads, list):
        threads = ", ".join(map(str, threads))
    return (
        f"{facts['cpu']}, {facts['cores']} cores, threads: {threads}, {facts['os']}, Python {facts['python']}, "
        f"{versions}; {facts['date_utc']}"
    )


def _padded(rows: Rows) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [
            cell.ljust(width) if head == SENTENCES else cell.rjust(width)
            for head, cell, width in zip(rows[0][1:], row[1:], widths[1:], strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _piped(rows: Rows) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---", *("---" if name == SENTENCES else "---:" for name in head[1:])], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
