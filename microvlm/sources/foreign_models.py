"""Models of other makers, where a MicroVLM was asked for: what they are, and the command that makes one of them.

Reads `model_type` of a config.json and nothing else.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from microvlm.config import CONFIG
from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.formats import documents
from microvlm.formats.documents import quote

OURS = "microvlm"
_MOST_BYTES = 10_000_000


class _Kind(msgspec.Struct, frozen=True):
    model_type: str | None = None


def foreign_type(folder: Path) -> str | None:
    """`model_type` of a folder's config.json, if it has one and it is not ours; None also for a damaged file."""
    try:
        kind = documents.parse(
            documents.read_file(folder / CONFIG, _MOST_BYTES), _Kind, CONFIG, ""
        ).model_type
    except (FileNotFoundError, UserError):
        return None
    return None if kind == OURS else kind


def describe_foreign(folder: Path, kind: str) -> str:
    """The refusal of a folder whose `model_type` is `kind`, with the next step."""
    from microvlm.model.pretrained.hf_config import DECODERS, ENCODERS

    shown = printable(str(folder))
    if kind in ENCODERS:
        return f"{shown} is a vision encoder ({kind}) alone: {_step(shown, 'DECODER')}."
    if kind in DECODERS:
        return f"{shown} is a decoder ({kind}) alone: {_step('ENCODER', shown)}."
    return (
        f"{shown} is a {quote(kind)} model, no MicroVLM: assemble one from a ViT or DeiT encoder and a Qwen2, Llama or "
        "BitNet decoder (microvlm assemble --help)."
    )


def describe_gguf(file: Path) -> str:
    """The refusal of a GGUF file, with the next step."""
    shown = printable(str(file))
    return f"{shown} is a decoder alone (GGUF): {_step('ENCODER', shown)}."


def assembly(vision: str, decoder: str) -> str:
    """The command that assembles two parts."""
    return f"microvlm assemble --vision {vision} --decoder {decoder} -o start"


def _step(vision: str, decoder: str) -> str:
    return f"assemble it first: {assembly(vision, decoder)}"
