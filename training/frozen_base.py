"""A frozen decoder held at four bits while new parts learn (QLoRA's NF4, arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from microvlm.errors import UserError

FOUR_BITS, FLOAT_BITS = 4, 32
BLOCK = 64
"""Weights of a row that share a scale; rows of another length stay in float."""
MISSING = (
    "--base-bits 4 holds the frozen decoder at four bits, which needs bitsandbytes: pip install bitsandbytes, or leave "
    "--base-bits out."
)


def check_base_bits(bits: int) -> None:
    """Raises UserError where four bits are asked for and bitsandbytes is not installed or does not load."""
    if bits != FOUR_BITS:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(MISSING)
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # its native library raises several kinds
        raise UserError(f"bitsandbytes does not load ({type(error).__name__}): install it anew.") from None


def quantize_frozen(decoder: nn.Module, device: torch.device) -> int:
    """Replace the decoder's linear layers whose weights are frozen by four-bit ones; returns how many.

    Raises UserError if there are none: what learns stays in float.
    """
    import bitsandbytes as bnb

    class FrozenLinear(bnb.nn.Linear4bit):
        """Stays in training mode: in evaluation, bitsandbytes packs weights for a kernel without gradients."""

        def train(self, mode: bool = True) -> FrozenLinear:
            return super().train(True)

    count = 0
    for parent in list(decoder.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer.weight.requires_grad:
                continue
            if layer.in_features % BLOCK:
                continue
            four: Any = FrozenLinear(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=torch.float32,
                quant_type="nf4",
            )
            four.weight = bnb.nn.Params4bit(
                layer.weight.detach().clone(), requires_grad=False, quant_type="nf4"
            )
            if layer.bias is not None:
                four.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
            setattr(parent, name, four.to(device))
            count += 1
    if count == 0:
        raise UserError("--base-bits 4 finds no frozen layer in the decoder: this recipe trains all of them.")
    return count
