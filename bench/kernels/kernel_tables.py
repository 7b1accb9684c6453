"""The report of `microvlm-bench kernels` as titled tables. Measures nothing."""

from __future__ import annotations

from microvlm.bench.kernels.kernel_records import KernelReport, SimulatedLoop, Speed, Speedup
from microvlm.bench.tables import Report, Table


def report(document: KernelReport) -> Report:
    facts = document.provenance
    memory, mapped = _streams(facts.stream_gb_per_s), _streams(facts.mapped_stream_gb_per_s)
    head = (
        f"ternary operators inside ONNX Runtime; kernels: {facts.kernels}; memory read at {memory}, "
        f"a mapped file at {mapped} thread(s)"
    )
    tables = _speed_tables(document.rows)
    if document.bars:
        tables += _speedup_tables(document.bars)
        title = "ours-2bit against the best peer [95 % interval]"
        tables.append(Table("bars", title, _bar_rows(document.bars)))
    simulated = document.predicted_cortex_a53
    if simulated and simulated.loops:
        title = "predicted: Cortex-A53, multiply-adds a cycle by llvm-mca"
        tables.append(Table("cortex-a53", title, _loop_rows(simulated.loops)))
    remarks = [
        f"{entry.name} {entry.status}: {entry.reason}" for entry in document.contenders if entry.reason
    ]
    if simulated and simulated.unavailable:
        remarks.append(f"no estimate for the Cortex-A53: {simulated.unavailable}")
    remarks.append(
        "each contender at its best setting; a hot figure's bytes come from a cache, so its share may pass 1, and a "
        "layer in fp32 (60 MB) fits none"
    )
    return Report(head, tables, remarks)


def _streams(gb_per_s: dict[str, float]) -> str:
    return ", ".join(f"{value:.1f} GB/s on {threads}" for threads, value in gb_per_s.items())


def _speed_tables(rows: list[Speed]) -> list[Table]:
    """A table for each shape, regime and number of threads; batches are its columns."""
    by_place: dict[tuple[str, str, int], list[Speed]] = {}
    for row in rows:
        by_place.setdefault((row.shape, row.regime, row.threads), []).append(row)
    tables = []
    for (shape, regime, threads), cells in by_place.items():
        batches = list(dict.fromkeys(row.batch for row in cells))
        by_name: dict[str, dict[int, Speed]] = {}
        for row in cells:
            by_name.setdefault(row.contender, {})[row.batch] = row
        table = [["contender", *(f"batch {batch}" for batch in batches)]]
        table += [
            [name, *(_speed(by_batch.get(batch)) for batch in batches)] for name, by_batch in by_name.items()
        ]
        title = f"{shape}, {regime}, {_threads(threads)}: GMAC/s (GB/s of weights, share of streaming)"
        tables.append(Table(f"{shape}-{regime}-{threads}", title, table))
    return tables


def _speedup_tables(bars: list[Speedup]) -> list[Table]:
    """Speed of our kernels over the best peer's, one table a shape: regimes and threads by batches."""
    tables = []
    for shape in dict.fromkeys(bar.shape for bar in bars):
        cells = {(bar.regime, bar.threads, bar.batch): bar for bar in bars if bar.shape == shape}
        batches = sorted({batch for _, _, batch in cells})
        rows = [["weights", *(f"batch {batch}" for batch in batches)]]
        for regime, threads in dict.fromkeys((regime, threads) for regime, threads, _ in cells):
            row_bars = [cells.get((regime, threads, batch)) for batch in batches]
            rows.append(
                [
                    f"{regime}, {_threads(threads)}",
                    *("-" if bar is None else _speedup(bar) for bar in row_bars),
                ]
            )
        tables.append(
            Table(f"speedup-{shape}", f"times as fast as the best peer, {shape} [95 % interval]", rows)
        )
    return tables


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _speedup(bar: Speedup) -> str:
    return f"{bar.speedup:.2f} [{bar.speedup_low:.2f}, {bar.speedup_high:.2f}]"


def _speed(row: Speed | None) -> str:
    if row is None:
        return "-"
    return f"{row.gmac_per_s:.1f} ({row.gb_per_s:.1f}, {row.roofline_share:.0%})"


def _bar_rows(bars: list[Speedup]) -> list[list[str]]:
    table = [
        [
            *("shape", "regime", "threads", "batch", "best peer", "times as fast", "bar"),
            *("of the roofline", "of a mapped file's", "met"),
        ]
    ]
    for bar in bars:
        table.append(
            [
                bar.shape,
                bar.regime,
                str(bar.threads),
                str(bar.batch),
                f"{bar.best_peer}, {bar.best_peer_threads} thr.",
                _speedup(bar),
                _number(bar.required_speedup),
                f"{bar.roofline_share:.0%}{_required_share(bar.required_roofline_share)}",
                f"{bar.mapped_stream_share:.0%}",
                _verdict(bar),
            ]
        )
    return table


def _loop_rows(loops: list[SimulatedLoop]) -> list[list[str]]:
    table = [["loop", "simulated", "bound by the busiest unit"]]
    for loop in loops:
        name = f"{loop.op}, {loop.packed_rows} packed rows x {loop.tokens} tokens"
        figures = (loop.predicted_macs_per_cycle, loop.predicted_macs_per_cycle_bound)
        table.append([name, *(f"{figure:.2f}" for figure in figures)])
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _required_share(value: float | None) -> str:
    return "" if value is None else f" (bar {value:.0%})"


def _verdict(bar: Speedup) -> str:
    if bar.required_speedup is None and bar.required_roofline_share is None:
        return "-"
    return "yes" if bar.met else "NO"
