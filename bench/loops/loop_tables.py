"""The report of `microvlm-bench loops` as a table. Predicts nothing."""

from __future__ import annotations

from microvlm.bench.loops.loop_records import LoopReport
from microvlm.bench.tables import Report, Table


def report(document: LoopReport) -> Report:
    """One table: a row for each loop."""
    rows = [
        [
            *("operator", "packed rows x tokens", "instructions", "multiply-adds"),
            *("by llvm-mca", "its busiest unit", "by published timings"),
        ]
    ]
    for loop in document.loops:
        figures = (
            loop.predicted_mca_macs_per_cycle,
            loop.predicted_mca_bound_macs_per_cycle,
            loop.predicted_timings_macs_per_cycle,
        )
        rows.append(
            [
                loop.op,
                f"{loop.packed_rows} x {loop.tokens}",
                str(loop.instructions),
                str(loop.multiply_adds),
                *(f"{figure:.2f}" for figure in figures),
            ]
        )
    title = "predicted multiply-adds a cycle of one Cortex-A53, weights in its first cache"
    head = f"inner loops of the ARMv8.0 kernels, compiled by {document.compiler}"
    return Report(head, [Table("loops", title, rows)], ["nothing here was measured on a Cortex-A53"])
