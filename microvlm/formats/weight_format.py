"""How a bundle's weights are stored: the widths and layouts there are. Needs no torch: a wrong one is told at once."""

from __future__ import annotations

from dataclasses import dataclass

from microvlm.errors import UserError

BITS = (32, 16, 8, 4, 1.58)
PACKINGS = {"2bit": "ternary2x4", "base3": "ternary3x5"}
"""Names of users -> layouts of `microvlm.formats.packing`."""
EMBEDDING_BITS = (32, 16, 8, 4)


@dataclass(frozen=True)
class WeightFormat:
    """Widths of the linears and of the token table, and the layout of ternary ones. Raises UserError, spelled as the
    flag.
    """

    bits: float = 1.58
    packing: str = "2bit"
    embedding_bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UserError(f"--bits {self.bits:g} is not offered; choose one of 32, 16, 8, 4, 1.58.")
        if self.packing not in PACKINGS:
            raise UserError(f"--packing {self.packing} is not offered; choose 2bit or base3.")
        if self.embedding_bits not in EMBEDDING_BITS:
            raise UserError(f"--embedding-bits {self.embedding_bits} is not offered; choose 16, 8 or 4.")
