"""A committed baseline of instruction counts as tables. Counts nothing."""

from __future__ import annotations

from microvlm.bench.pi.pi_records import CountReport
from microvlm.bench.tables import Report, Table


def report(document: CountReport) -> Report:
    key = document.key
    rows = [["phase", "instructions, M", "of them SIMD, M", "in our kernels, M"]]
    for phase, counts in document.phases.items():
        kernels = counts.instructions - counts.others
        figures = (counts.instructions, counts.simd, kernels)
        rows.append([phase, *(f"{figure / 1e6:.2f}" for figure in figures)])
    title = f"instructions counted on an emulated {key.cpu}, one thread"
    versions = (
        f"onnxruntime {key.onnxruntime}, numpy {key.numpy}, python {key.python}, compiler {key.compiler}"
    )
    made_with = f"emulated {key.cpu}, {versions}, {key.system}; graphs {key.graphs}"
    return Report(f"instruction counts of {document.model}", [Table("counts", title, rows)], [made_with])
