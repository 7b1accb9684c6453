"""The report of `microvlm-bench paths` as tables. Measures nothing."""

from __future__ import annotations

from collections import Counter

from microvlm.bench.paths.path_records import BundlePaths, PathReport, ProductPath
from microvlm.bench.tables import Report, Table

_HEAD = [
    *(
        "graph",
        "in the file",
        "what runs",
        "provider",
        "bits",
        "block",
        "accuracy level",
        "K x N",
        "products",
    ),
]


def report(document: PathReport) -> Report:
    """A summary, and a table for each bundle, named by its lowering and width."""
    tables = [
        Table(_name(bundle), _title(bundle), [_HEAD, *map(_row, bundle.products)])
        for bundle in document.bundles
    ]
    return Report("Operators that run each product", [_summary(document), *tables], [])


def _summary(document: PathReport) -> Table:
    """Products of all graphs and shapes that take one path in one line."""
    counts: Counter[tuple[str, ...]] = Counter()
    for bundle in document.bundles:
        for path in bundle.products:
            cells = _row(path)
            counts[(bundle.lowering, f"{bundle.bits:g}", *cells[1:-2])] += path.count
    head = ["lowering", "--bits", *_HEAD[1:-2], "products"]
    return Table("summary", "Paths of all graphs", [head, *([*cells, str(n)] for cells, n in counts.items())])


def _name(bundle: BundlePaths) -> str:
    return f"{bundle.lowering}-{bundle.bits:g}bit"


def _title(bundle: BundlePaths) -> str:
    return (
        f"{bundle.name}: --lowering {bundle.lowering} --bits {bundle.bits:g} --embedding-bits "
        f"{bundle.embedding_bits:g}, {bundle.total_bytes / 1e6:.1f} MB, opset {bundle.opset}, IR {bundle.ir}, "
        f"kernels: {bundle.kernels}"
    )


def _row(path: ProductPath) -> list[str]:
    return [
        path.graph,
        path.written,
        path.runs_as if path.is_replaced else "the same",
        path.provider,
        *("-" if value is None else f"{value:g}" for value in (path.bits, path.block, path.accuracy_level)),
        f"{path.columns} x {path.rows}",
        str(path.count),
    ]
