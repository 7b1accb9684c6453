"""Supported bit widths and packings of a bundle's weights. Imports no torch, so bad flags fail fast."""

from __future__ import annotations

from dataclasses import dataclass

from microvlm.errors import UserError
from microvlm.formats.op_table import OPS

BITS = (32, 16, 8, 4, 1.58)
PACKINGS = {op.packing_name: op.kind for op in OPS.values() if op.packing_name}
"""Values of --packing -> storage kinds of `op_table`."""
PACKING_HELP = f"Bytes of ternary weights: {' or '.join(PACKINGS)}."
EMBEDDING_BITS = (32, 16, 8, 4)


@dataclass(frozen=True)
class WeightFormat:
    """Bit widths of the linears and of the token table, and the packing of ternary ones. Fields are the flags.

    Raises UserError for a value that is not supported.
    """

    bits: float = 1.58
    packing: str = "2bit"
    embedding_bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UserError(f"--bits {self.bits:g} is not offered; choose one of 32, 16, 8, 4, 1.58.")
        if self.packing not in PACKINGS:
            raise UserError(f"--packing {self.packing} is not offered; choose {' or '.join(PACKINGS)}.")
        if self.embedding_bits not in EMBEDDING_BITS:
            raise UserError(f"--embedding-bits {self.embedding_bits} is not offered; choose 16, 8 or 4.")
