"""The list of contenders, and which of them run here. A name is `ours-*` or `ort-*`; `:variant` names a kernel variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from microvlm.bench.kernels.formats import BASE_3, TWO_BIT, Dense, Format, NBits
from microvlm.errors import UserError


@dataclass(frozen=True)
class Contender:
    name: str
    format: Format
    native: bool = False
    """Whether it runs our kernels; else nothing is registered with ONNX Runtime."""
    variant: str | None = None
    """The instruction-set variant that is forced, or None for the one that a user gets."""
    session_entries: dict[str, str] = field(default_factory=dict)
    regimes: tuple[str, ...] = ("hot", "dram")

    @property
    def is_peer(self) -> bool:
        return self.name.startswith("ort-")


OURS = (
    Contender("ours-2bit", TWO_BIT, native=True),
    Contender("ours-base3", BASE_3, native=True),
)
# Bound by arithmetic everywhere, and ten to a hundred times slower: nothing is learnt from it in memory.
FUNCTION = Contender("ours-2bit-function", TWO_BIT, regimes=("hot",))
PEERS = (
    Contender("ort-2bit-b128", NBits(2, 128)),
    Contender("ort-2bit-lut", NBits(2, 128), session_entries={"mlas.use_lut_gemm": "1"}),
    Contender("ort-4bit-b32", NBits(4, 32)),
    Contender("ort-4bit-b128", NBits(4, 128)),
    Contender("ort-8bit-b128", NBits(8, 128)),
    Contender("ort-fp32", Dense()),
)
DECODE_PEERS = ("ort-2bit-b128", "ort-2bit-lut", "ort-4bit-b32", "ort-4bit-b128")
"""What our two bits are compared with at batch 1: a stored 8-bit matrix is four times the bytes."""
PREFILL_PEERS = (*DECODE_PEERS, "ort-8bit-b128")
