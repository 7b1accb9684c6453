"""A committed baseline of instruction counts as tables. Reads JSON, counts nothing."""

from __future__ import annotations

from typing import Any

from microvlm.bench.tables import Report, Table


def report(document: dict[str, Any]) -> Report:
    key = document["key"]
    rows = [["phase", "instructions, M", "of them SIMD, M", "in our kernels, M"]]
    for phase, counts in document["phases"].items():
        kernels = counts["instructions"] - counts["others"]
        figures = (counts["instructions"], counts["simd"], kernels)
        rows.append([phase, *(f"{figure / 1e6:.2f}" for figure in figures)])
    title = f"instructions counted on an emulated {key['cpu']}, one thread"
    versions = ", ".join(f"{name} {key[name]}" for name in ("onnxruntime", "numpy", "python", "compiler"))
    made_with = f"emulated {key['cpu']}, {versions}, {key['system']}; graphs {key['graphs']}"
    return Report(f"instruction counts of {document['model']}", [Table("counts", title, rows)], [made_with])
