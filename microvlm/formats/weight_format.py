"""Supported bit widths and packings of a bundle's weights. Imports no torch, so bad flags fail fast.

Importing it loads no numpy either: the table of packings is read when a `WeightFormat` is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from microvlm.errors import UserError

BITS = (32, 16, 8, 4, 1.58)
PACKING_HELP = "Bytes of ternary weights: 2bit or base3."
"""Help of --packing. A test compares it with the table."""
EMBEDDING_BITS = (32, 16, 8, 4)
LOWERINGS = ("custom", "matmulnbits", "qdq")
"""Operators of products: ours, ONNX Runtime's MatMulNBits, or ONNX's DequantizeLinear and MatMul."""


@dataclass(frozen=True)
class WeightFormat:
    """Bit widths of the linears and of the token table, and the packing of ternary ones. Fields are the flags.

    Raises UserError for a value that is not supported.
    """

    bits: float = 1.58
    packing: str = "2bit"
    embedding_bits: int = 8
    lowering: str = "custom"

    def __post_init__(self) -> None:
        if not _is_one_of(self.bits, BITS):
            bits = f"{self.bits:g}" if isinstance(self.bits, Real) else repr(self.bits)
            raise UserError(f"--bits {bits} is not offered; choose one of 32, 16, 8, 4, 1.58.")
        if not _is_one_of(self.embedding_bits, EMBEDDING_BITS):
            raise UserError(f"--embedding-bits {self.embedding_bits!r} is not offered; choose 16, 8 or 4.")
        if self.lowering not in LOWERINGS:
            raise UserError(
                f"--lowering {self.lowering} is not offered; choose one of {', '.join(LOWERINGS)}."
            )
        if self.lowering != "custom" and self.bits > 8:
            raise UserError(
                f"--lowering {self.lowering} is of integer weights, and --bits is {self.bits:g}; give 8, 4 or 1.58."
            )
        from microvlm.formats.op_table import MATMUL_BY_PACKING

        if not isinstance(self.packing, str) or self.packing not in MATMUL_BY_PACKING:
            raise UserError(
                f"--packing {self.packing} is not offered; choose {' or '.join(MATMUL_BY_PACKING)}."
            )


def _is_one_of(value: object, widths: tuple[float, ...]) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value in widths
