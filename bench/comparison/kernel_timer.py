"""Times the products of the native library that a bundle uses, one by one, without ONNX Runtime around them.

A phase hides a kernel: a product that became a tenth slower may be a fiftieth of a caption. Each product here has the
bundle's own widths, and as many rows as fill PACKED_BYTES, so that neither the call nor memory hides it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from microvlm.backends import native
from microvlm.backends.native.kernel_calls import bind_multiply
from microvlm.bench.speed.phases import clock
from microvlm.formats.manifest import read_manifest
from microvlm.formats.op_spec import OpSpec
from microvlm.formats.op_table import MATMUL_BY_KIND

TOKENS = (1, 32)
"""A decoded token and a prefill: the library has other loops for few tokens than for many."""
PACKED_BYTES = 262_144
"""Bytes of packed weights: a second-level cache holds them, and a product takes ten times as long as its call."""
SAMPLE_MS = 0.5
"""A sample repeats a product for about this long: a machine that does other work interrupts most samples of 3 ms."""


@dataclass(frozen=True)
class Product:
    """A product to time: `rows` of `columns` weights, `tokens` at once."""

    op: OpSpec
    rows: int
    columns: int
    tokens: int

    @property
    def name(self) -> str:
        return f"kernel {self.op.kind}, {self.tokens} token{'s' * (self.tokens > 1)}"


def products_of(bundle: Path) -> list[Product]:
    """The products of a bundle: every kind of storage with an operator, at its commonest width. Raises UserError."""
    widths: dict[str, Counter[int]] = {}
    for layer in read_manifest(bundle).lowered.values():
        if layer.kind in MATMUL_BY_KIND:
            widths.setdefault(layer.kind, Counter())[layer.columns] += layer.rows
    products = []
    for kind in sorted(widths):
        op, (columns, _) = MATMUL_BY_KIND[kind], widths[kind].most_common(1)[0]
        rows = max(1, round(PACKED_BYTES * 8 / op.bits_per_weight / columns))
        products += [Product(op, rows, columns, tokens) for tokens in TOKENS]
    return products


class KernelTimer:
    """Random weights of every product of a bundle, ready to multiply; `names` is empty without the native library."""

    def __init__(self, bundle: Path):
        self._timed: dict[str, tuple[Callable[[], None], int]] = {}
        if native.library_path() is None:
            return
        for product in products_of(bundle):
            multiply = _bound(product)
            multiply()
            once_ms = min(clock(multiply) for _ in range(3))
            self._timed[product.name] = (multiply, max(1, round(SAMPLE_MS / once_ms)))

    @property
    def names(self) -> list[str]:
        return list(self._timed)

    def run(self, name: str) -> float:
        """One sample of a product -> milliseconds of one call."""
        multiply, repeats = self._timed[name]

        def sample() -> None:
            for _ in range(repeats):
                multiply()

        return clock(sample) / repeats


def _bound(product: Product) -> Callable[[], None]:
    random = np.random.default_rng(5)
    op, rows, columns = product.op, product.rows, product.columns
    if op.quantize is not None:
        *weights, scale = op.quantize(random.standard_normal((rows, columns), np.float32))
    else:
        weights = list(op.pack(random.integers(-1, 2, (rows, columns)).astype(np.int8)))
        scale = np.ones(1, np.float32)
    x = random.standard_normal((product.tokens, columns), np.float32)
    out = np.empty((product.tokens, rows), np.float32)
    packed, multiplier = weights[0], weights[1] if op.has_multiplier else None
    return bind_multiply(native.active_variant(), op.name, x, packed, scale, rows, multiplier, out)
