"""The named contenders of the kernel benchmark. A name is `ours-*` or `ort-*`, with `:variant` where one is forced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from microvlm.bench.kernels.contender_formats import BASE_3, TWO_BIT, Dense, Format, NBits
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
    is_slow: bool = False
    """Ten to a hundred times slower, bound by arithmetic everywhere: one matrix, and only hot."""

    @property
    def is_peer(self) -> bool:
        return self.name.startswith("ort-")

    def takes_part(self, regime: str) -> bool:
        return regime == "hot" or not self.is_slow


REFERENCE_VARIANT = "reference"
"""The scalar kernels: a second a run at 64 tokens, so measured when asked for."""

OURS = (
    Contender("ours-2bit", TWO_BIT, native=True),
    Contender("ours-base3", BASE_3, native=True),
)
FUNCTION = Contender("ours-2bit-function", TWO_BIT, is_slow=True)
PEERS = (
    Contender("ort-2bit-b128", NBits(2, 128)),
    Contender("ort-2bit-lut", NBits(2, 128), session_entries={"mlas.use_lut_gemm": "1"}),
    Contender("ort-4bit-b32", NBits(4, 32)),
    Contender("ort-4bit-b128", NBits(4, 128)),
    Contender("ort-8bit-b128", NBits(8, 128)),
    Contender("ort-fp32", Dense()),
)
DECODE_PEERS = ("ort-2bit-b128", "ort-2bit-lut", "ort-4bit-b32", "ort-4bit-b128")
"""Peers of our 2-bit formats at batch 1: a stored 8-bit matrix is four times the bytes."""
PREFILL_PEERS = (*DECODE_PEERS, "ort-8bit-b128")


def variants_of(contender: Contender, variants: Sequence[str]) -> list[Contender]:
    """One of ours with each of `variants` forced, as `NAME:VARIANT`."""
    return [
        replace(
            contender,
            name=f"{contender.name}:{variant}",
            variant=variant,
            is_slow=variant == REFERENCE_VARIANT,
        )
        for variant in variants
    ]


def choose(available: Sequence[Contender], names: Sequence[str], have_library: bool) -> list[Contender]:
    """The contenders of `available` with these names, or all but the scalar reference. Raises UserError."""
    available_names = [contender.name for contender in available]
    for name in names:
        if name in available_names:
            continue
        if not have_library and name.startswith("ours-"):
            raise UserError(
                f"--contender {name} needs the native library: install the package where a C++ compiler is."
            )
        raise UserError(f"--contender {name} is unknown here; choose among {', '.join(available_names)}.")
    if not names:
        return [contender for contender in available if contender.variant != REFERENCE_VARIANT]
    return [contender for contender in available if contender.name in names]
