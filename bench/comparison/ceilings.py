"""The time below which a phase cannot fall where weights come from memory: their bytes at the streaming bandwidth.

A cache may beat it, and a phase of many tokens computes for longer than it reads: the share says which of the two.
"""

from __future__ import annotations

from pathlib import Path

from microvlm.bench.comparison.kernel_timer import products_of
from microvlm.bench.speed.speed_bench import bytes_read_per_token

_GRAPHS = {
    "vision": ("vision_encoder",),
    # Key and fact are encoded one after the other; the weights are read twice.
    "memory_write": ("memory_encode", "memory_encode", "memory_write"),
    "memory_read": ("memory_encode", "memory_read"),
}
"""The graphs that a phase runs; those of the decoder read the tied head too (`bytes_read_per_token`)."""


def weight_bytes(bundle: Path) -> dict[str, int]:
    """Bytes of weights that one run of each phase or product reads, where that is one number. Raises UserError."""
    folder = bundle / "onnx"
    decoder = bytes_read_per_token(bundle)
    read = {
        phase: sum(_size(folder / f"{graph}.data") for graph in graphs) for phase, graphs in _GRAPHS.items()
    }
    products = {
        product.name: round(product.rows * product.columns * product.op.bits_per_weight / 8)
        for product in products_of(bundle)
    }
    return {**read, "prefill": decoder, "decode": decoder, **products}


def share_of_ceiling(read_bytes: int | None, milliseconds: float, bytes_per_s: float) -> float | None:
    """Share of the streaming bandwidth that reading `read_bytes` in this time reaches; None without a number."""
    return None if not read_bytes else read_bytes / (milliseconds * 1e-3) / bytes_per_s


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
