"""The contenders: in which bytes each holds a matrix, the ONNX node that reads them, and its product in numpy.

Ours are the ternary operators of `op_table`. ONNX Runtime's are `com.microsoft.MatMulNBits` with accuracy_level 4 (int8
activations; without it the 2-bit path takes every weight apart at each call) and plain MatMul. MatMulNBits, B bits, one
fp32 scale for each block of one row's K, zero point 2^(B - 1):

    packed[n, block, j] = codes of k = block * size + j * 8 / B, ..., lowest first     uint8 [N, blocks, size * B / 8]
    weight[n, k] = (code - 2^(B - 1)) * scale[n, k / size]                             K padded with weight 0

Random weights everywhere: no path looks at their values. Needs onnx only to make nodes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from microvlm.formats.op_spec import OpSpec
from microvlm.formats.op_table import DOMAIN, TERNARY_2X4, TERNARY_3X5

if TYPE_CHECKING:
    import onnx

Operands = tuple[np.ndarray, ...]
"""The constant inputs of one linear's node, in the node's order."""


class Format(ABC):
    """A contender's format: it stores and multiplies a matrix [N, K]."""

    tolerance: float
    """Largest relative error (norm) of a product against `product`; 0 means `==`."""

    @abstractmethod
    def operands(self, rng: np.random.Generator, k: int, n: int) -> Operands:
        """Random weights whose outputs are about as large as their inputs."""

    @abstractmethod
    def node(self, x: str, operands: list[str], y: str, k: int, n: int) -> onnx.NodeProto: ...

    @abstractmethod
    def product(self, x: np.ndarray, operands: Operands, n: int) -> np.ndarray:
        """float32 [M, K] -> [M, N], slowly."""


@dataclass(frozen=True)
class Ternary(Format):
    """One of our operators, by kernel or by function body: both have these operands and this product, bit for bit."""

    op: OpSpec
    tolerance: float = 0.0

    def operands(self, rng: np.random.Generator, k: int, n: int) -> Operands:
        trits = rng.integers(-1, 2, (n, k), dtype=np.int8)
        return *self.op.pack(trits), np.array([(1.5 / k) ** 0.5], np.float32)

    def node(self, x: str, operands: list[str], y: str, k: int, n: int) -> onnx.NodeProto:
        from onnx import helper

        return helper.make_node(self.op.name, [x, *operands], [y], domain=DOMAIN, rows=n)

    def product(self, x: np.ndarray, operands: Operands, n: int) -> np.ndarray:
        return self.op.reference(x, *operands, rows=n)


@dataclass(frozen=True)
class NBits(Format):
    """`MatMulNBits` with symmetric weights."""

    bits: int
    block: int
    tolerance: float = 0.03
    """Its activations are int8 by block: half a per cent of a product's norm, and a layer multiplies four times."""

    def operands(self, rng: np.random.Generator, k: int, n: int) -> Operands:
        blocks = -(-k // self.block)
        middle = 1 << (self.bits - 1)
        codes = np.full((n, blocks * self.block), middle, np.uint8)
        codes[:, :k] = rng.integers(1, 2 * middle, (n, k), dtype=np.uint8)
        deviation = np.sqrt((middle - 1) * middle / 3)  # of the integers from -(middle - 1) to middle - 1
        spread = rng.uniform(0.7, 1.3, (n, blocks)).astype(np.float32)
        scale = spread * np.float32(1 / (deviation * np.sqrt(k)))
        return pack_blocks(codes, self.bits, self.block), scale

    def node(self, x: str, operands: list[str], y: str, k: int, n: int) -> onnx.NodeProto:
        from onnx import helper

        return helper.make_node(
            "MatMulNBits",
            [x, *operands],
            [y],
            domain="com.microsoft",
            accuracy_level=4,
            K=k,
            N=n,
            bits=self.bits,
            block_size=self.block,
        )

    def product(self, x: np.ndarray, operands: Operands, n: int) -> np.ndarray:
        packed, scale = operands
        codes = unpack_blocks(packed, self.bits)[:, : x.shape[1]].astype(np.float32)
        weights = (codes - (1 << (self.bits - 1))) * np.repeat(scale, self.block, 1)[:, : x.shape[1]]
        return x @ weights.T


@dataclass(frozen=True)
class Dense(Format):
    """fp32 MatMul, weights [K, N]."""

    tolerance: float = 1e-4

    def operands(self, rng: np.random.Generator, k: int, n: int) -> Operands:
        return (rng.standard_normal((k, n), np.float32) / np.float32(np.sqrt(k)),)

    def node(self, x: str, operands: list[str], y: str, k: int, n: int) -> onnx.NodeProto:
        from onnx import helper

        return helper.make_node("MatMul", [x, *operands], [y])

    def product(self, x: np.ndarray, operands: Operands, n: int) -> np.ndarray:
        return x @ operands[0]


def pack_blocks(codes: np.ndarray, bits: int, block: int) -> np.ndarray:
    """uint8 codes [N, blocks * block] below 2^bits -> uint8 [N, blocks, block * bits / 8]."""
    per_byte = 8 // bits
    packed = np.zeros((codes.shape[0], codes.shape[1] // per_byte), np.uint8)
    for place in range(per_byte):
        packed |= codes[:, place::per_byte] << np.uint8(place * bits)
    return packed.reshape(codes.shape[0], -1, block * bits // 8)


def unpack_blocks(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [N, blocks, bytes] -> uint8 codes [N, blocks * block]."""
    flat = packed.reshape(packed.shape[0], -1)
    mask = np.uint8((1 << bits) - 1)
    planes = [flat >> np.uint8(shift) & mask for shift in range(0, 8, bits)]
    return np.stack(planes, -1).reshape(packed.shape[0], -1)


TWO_BIT = Ternary(TERNARY_2X4)
BASE_3 = Ternary(TERNARY_3X5)
