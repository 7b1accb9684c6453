"""Checks a contender's product against numpy's before it is timed: a fast wrong kernel is not a contender."""

from __future__ import annotations

import numpy as np

from microvlm.bench.kernels.contender_formats import Format, Operands
from microvlm.bench.kernels.workload import Shape


def expected(form: Format, shape: Shape, operands: tuple[Operands, ...], x: np.ndarray) -> np.ndarray:
    """The last result of a shape, float32 [M, N], in numpy and through the linears that it depends on."""
    values = {"x": x}
    for linear, arrays in zip(shape.linears, operands, strict=True):
        values[linear.name] = form.product(values[linear.source], arrays, linear.n)
    return values[shape.results[-1].name]


def relative_error(result: np.ndarray, reference: np.ndarray) -> float:
    """|result - reference| / |reference|, 0 only where all values are equal. NaN where either is not a number."""
    if np.array_equal(result, reference):
        return 0.0
    wide = reference.astype(np.float64)
    return float(np.linalg.norm(result - wide) / np.linalg.norm(wide))
