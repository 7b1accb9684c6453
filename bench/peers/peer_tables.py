"""The report of `microvlm-bench peers` as tables. Measures nothing."""

from __future__ import annotations

from microvlm.bench.peers.peer_records import PeerReport, PeerRow
from microvlm.bench.records import Estimate
from microvlm.bench.tables import Report, Table


def report(document: PeerReport) -> Report:
    """Speeds and ratios for each number of threads, the programs, and a sentence for each that did not run."""
    shape, workload = document.shape, document.workload
    head = (
        f"{shape.name}: {shape.layers} layers of {shape.width} and {shape.inner_width}, "
        f"{shape.vocabulary:,} tokens{', random weights' if shape.random else ''}"
    )
    counts = list(dict.fromkeys(row.threads for row in document.rows))
    tables = []
    for threads in counts:
        rows = [row for row in document.rows if row.threads == threads]
        plural = "s" if threads > 1 else ""
        tables += [
            Table(f"threads-{threads}", f"{threads} thread{plural}", _speeds(rows)),
            Table(
                f"ratios-{threads}",
                f"Speed as a multiple of ours, {threads} thread{plural}",
                _ratios(document, rows),
            ),
        ]
    tables.append(Table("programs", "Programs and their weights", _programs(document)))
    remarks = [
        f"prefill of {workload.prompt_tokens} tokens, decode of {workload.new_tokens} more; medians of "
        f"{workload.rounds} rounds, all programs in turns, with 95 % intervals",
        *dict.fromkeys(
            f"{row.name}, {row.threads} thread{'s' * (row.threads > 1)}: {row.reason}"
            for row in document.rows
            if row.status != "ok"
        ),
    ]
    return Report(head, tables, remarks)


def _speeds(rows: list[PeerRow]) -> list[list[str]]:
    head = ["program", "weights", "prefill, tokens/s", "decode, tokens/s", "MB a token", "peak RSS, MB"]
    return [
        head,
        *(
            [
                row.name,
                row.weights,
                _interval(row.prefill_tokens_per_s, 1),
                _interval(row.decode_tokens_per_s, 1),
                _megabytes(row.weight_bytes_per_token),
                _megabytes(row.peak_rss_bytes),
            ]
            for row in rows
        ),
    ]


def _ratios(document: PeerReport, rows: list[PeerRow]) -> list[list[str]]:
    """A row for each program, and two columns for each of our own."""
    threads = rows[0].threads
    found = {
        (ratio.name, ratio.against, ratio.phase): Estimate(ratio.value, ratio.low, ratio.high)
        for ratio in document.ratios
        if ratio.threads == threads
    }
    columns = [(row.name, phase) for row in rows if row.is_ours for phase in ("prefill", "decode")]
    lines = [["program", *(f"{phase}, of {name}" for name, phase in columns)]]
    for row in rows:
        cells = []
        for against, phase in columns:
            cells.append("1" if row.name == against else _interval(found.get((row.name, against, phase)), 2))
        lines.append([row.name, *cells])
    return lines


def _programs(document: PeerReport) -> list[list[str]]:
    """What ran, of every thread count alike; a program that never ran has dashes."""
    lines: dict[str, list[str]] = {}
    for row in document.rows:
        if row.name not in lines or lines[row.name][1] == "-":
            lines[row.name] = [row.name, row.version or "-", row.kernels or "-", row.weights, row.file]
    return [["program", "version", "products", "weights", "file"], *lines.values()]


def _interval(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f}-{estimate.high:.{digits}f})"


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.0f}"
