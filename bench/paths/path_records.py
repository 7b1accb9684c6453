"""The record of a report of `microvlm-bench paths`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.records import Figure, Provenance
from microvlm.formats.documents import Count


class ProductPath(msgspec.Struct, frozen=True):
    """Products of one graph that take the same path and have the same shape."""

    graph: str
    written: str
    """Operators in the bundle's file."""
    runs_as: str
    """Operators in the graph that ONNX Runtime made of it."""
    is_replaced: bool
    provider: str
    """Execution provider that ran the last of them, from ONNX Runtime's profile."""
    bits: Figure | None
    """Of a weight, as it is multiplied; None for floats and where a function's nodes unpack it."""
    block: Count | None
    """Weights of a row that share a scale; None where that is a row or the matrix."""
    accuracy_level: Count | None
    """Attribute of MatMulNBits; None for other operators."""
    columns: Count
    rows: Count
    count: Count


class BundlePaths(msgspec.Struct, frozen=True):
    """One bundle."""

    name: str
    bits: Figure
    embedding_bits: Figure
    lowering: str
    kernels: str
    total_bytes: Count
    opset: Count
    ir: Count
    """The highest of its graphs."""
    products: Annotated[list[ProductPath], Meta(min_length=1)]


class PathReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document."""

    bundles: Annotated[list[BundlePaths], Meta(min_length=1)]
    provenance: Provenance
