"""The variants of a training step that `microvlm-bench train` measures side by side. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple


class Variant(NamedTuple):
    """A way to train: the decoder's width and the precision of the step."""

    decoder_bits: float
    """As in a recipe's stage: 32, or 1.58 (then the embedding has 8 bits)."""
    mixed_precision: str
    """As in a recipe: `no` or `bf16`."""
    meaning: str


VARIANTS = {
    "fp32": Variant(32, "no", "float32 weights and products"),
    "bf16": Variant(32, "bf16", "float32 weights, products under bfloat16 autocast"),
    "qat": Variant(1.58, "no", "ternary decoder, 8-bit embedding, exact sums; gradients in float32"),
    "qat-bf16": Variant(1.58, "bf16", "the same under bfloat16 autocast: gradients' products in bfloat16"),
}
BASE = "fp32"
"""What the others are compared with."""
PHASES = ("data", "vision", "forward", "backward", "step")
