"""The document of `microvlm-bench kernels` as titled tables, for `report`. Reads JSON, measures nothing."""

from __future__ import annotations

from typing import Any

Section = tuple[str, list[list[str]]]


def sections(document: dict[str, Any]) -> tuple[str, list[Section], list[str]]:
    """Head, tables and remarks."""
    facts = document["provenance"]
    memory, mapped = _streams(facts["stream_gb_per_s"]), _streams(facts["mapped_stream_gb_per_s"])
    head = (
        f"ternary operators inside ONNX Runtime; kernels: {facts['kernels']}; memory read at {memory}, "
        f"a mapped file at {mapped} thread(s)"
    )
    tables = [
        (f"{place}: GMAC/s (GB/s of weights, share of streaming)", table)
        for place, table in _speed_tables(document["rows"])
    ]
    if document["bars"]:
        tables.append(("ours-2bit against the best peer [95 % interval]", _bar_table(document["bars"])))
    simulated = document.get("predicted_cortex_a53")
    if simulated and simulated["loops"]:
        tables.append(
            ("predicted: Cortex-A53, multiply-adds a cycle by llvm-mca", _loop_table(simulated["loops"]))
        )
    remarks = [
        f"{entry['name']} {entry['status']}: {entry['reason']}"
        for entry in document["contenders"]
        if entry["reason"]
    ]
    if simulated and simulated["unavailable"]:
        remarks.append(f"no estimate for the Cortex-A53: {simulated['unavailable']}")
    remarks.append(
        "each contender at its best setting; a hot figure's bytes come from a cache, so its share may pass 1, and a "
        "layer in fp32 (60 MB) fits none"
    )
    return head, tables, remarks


def _streams(gb_per_s: dict[str, float]) -> str:
    return ", ".join(f"{value:.1f} GB/s on {threads}" for threads, value in gb_per_s.items())


def _speed_tables(rows: list[dict[str, Any]]) -> list[Section]:
    """A table for each shape, regime and number of threads; batches are its columns."""

    def place(row: dict[str, Any]) -> str:
        return f"{row['shape']}, {row['regime']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"

    by_place: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_place.setdefault(place(row), []).append(row)
    tables: list[Section] = []
    for key, cells in by_place.items():
        batches = list(dict.fromkeys(row["batch"] for row in cells))
        by_name: dict[str, dict[int, dict[str, Any]]] = {}
        for row in cells:
            by_name.setdefault(row["contender"], {})[row["batch"]] = row
        table = [["contender", *(f"batch {batch}" for batch in batches)]]
        table += [[name, *(_speed(found.get(batch)) for batch in batches)] for name, found in by_name.items()]
        tables.append((key, table))
    return tables


def _speed(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{row['gmac_per_s']:.1f} ({row['gb_per_s']:.1f}, {row['roofline_share']:.0%})"


def _bar_table(bars: list[dict[str, Any]]) -> list[list[str]]:
    table = [
        [
            *("shape", "regime", "threads", "batch", "best peer", "times as fast", "bar"),
            *("of the roofline", "of a mapped file's", "met"),
        ]
    ]
    for bar in bars:
        table.append(
            [
                bar["shape"],
                bar["regime"],
                str(bar["threads"]),
                str(bar["batch"]),
                f"{bar['best_peer']}, {bar['best_peer_threads']} thr.",
                f"{bar['speedup']:.2f} [{bar['speedup_low']:.2f}, {bar['speedup_high']:.2f}]",
                _number(bar["required_speedup"]),
                f"{bar['roofline_share']:.0%}{_wanted(bar['required_roofline_share'])}",
                f"{bar['mapped_stream_share']:.0%}",
                _verdict(bar),
            ]
        )
    return table


def _loop_table(loops: list[dict[str, Any]]) -> list[list[str]]:
    table = [["loop", "simulated", "bound by the busiest unit"]]
    for loop in loops:
        name = f"{loop['op']}, {loop['packed_rows']} packed rows x {loop['tokens']} tokens"
        figures = (loop["predicted_macs_per_cycle"], loop["predicted_macs_per_cycle_bound"])
        table.append([name, *(f"{figure:.2f}" for figure in figures)])
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _wanted(value: float | None) -> str:
    return "" if value is None else f" (bar {value:.0%})"


def _verdict(bar: dict[str, Any]) -> str:
    if bar["required_speedup"] is None and bar["required_roofline_share"] is None:
        return "-"
    return "yes" if bar["met"] else "NO"
