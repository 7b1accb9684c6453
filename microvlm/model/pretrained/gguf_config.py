"""The configuration of a Llama or Qwen2 decoder from the metadata of a GGUF file. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from microvlm.config import TextConfig
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Size, quote
from microvlm.formats.headers.gguf_header import REMEDY, GgufHeader

ARCHITECTURES = ("llama", "qwen2")
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_ARCHITECTURE = "general.architecture"


class _Decoder(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a decoder's metadata."""

    layers: Size
    width: Size
    inner: Size
    positions: Size
    heads: Size
    kv_heads: Size | None = None
    epsilon: Annotated[float, Meta(gt=0)]
    base: float = 10_000.0
    head_dim: Size | None = None
    value_dim: Size | None = None
    rotated: Size | None = None
    scaling: str | None = None
    window: int = 0
    experts: int = 0


_KEYS = {
    "layers": "block_count",
    "width": "embedding_length",
    "inner": "feed_forward_length",
    "positions": "context_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "epsilon": "attention.layer_norm_rms_epsilon",
    "base": "rope.freq_base",
    "head_dim": "attention.key_length",
    "value_dim": "attention.value_length",
    "rotated": "rope.dimension_count",
    "scaling": "rope.scaling.type",
    "window": "attention.sliding_window",
    "experts": "expert_count",
}


def architecture(header: GgufHeader) -> str:
    """The architecture of a decoder that is supported. Raises UserError for another one."""
    name = header.metadata.get(_ARCHITECTURE)
    if name not in ARCHITECTURES:
        raise UserError(f"{header.path}: a {quote(name)} decoder is not supported; use Llama or Qwen2.")
    return str(name)


def gguf_text_config(header: GgufHeader, sub_norm: bool = False) -> TextConfig:
    """The configuration of a decoder. Raises UserError for what our decoder would compute differently."""
    kind = architecture(header)
    raw: _Decoder = header.record(_Decoder, {field: f"{kind}.{key}" for field, key in _KEYS.items()})
    head_dim = raw.head_dim or raw.width // raw.heads
    for wrong, problem in (
        (
            (raw.scaling or "none") != "none" or "rope_freqs.weight" in header.tensors,
            "scaled rotary embeddings are",
        ),
        ((raw.rotated or head_dim) != head_dim, "partial rotary embeddings are"),
        ((raw.value_dim or head_dim) != head_dim, "values that are not as wide as keys are"),
        (raw.window, "sliding-window attention is"),
        (raw.experts, "a mixture of experts is"),
        (HEAD in header.tensors, "an output head that is not tied to the embedding is"),
    ):
        if wrong:
            raise UserError(f"{header.path}: {problem} not supported; take another decoder.")
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{header.path} lacks '{EMBEDDING}': {REMEDY}.")
    values: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": raw.width,
        "num_hidden_layers": raw.layers,
        "num_attention_heads": raw.heads,
        "num_key_value_heads": raw.kv_heads or raw.heads,
        "head_dim": head_dim,
        "intermediate_size": raw.inner,
        "rms_norm_eps": raw.epsilon,
        "rope_theta": raw.base,
        "attention_bias": kind == "qwen2",
        "sub_norm": sub_norm,
        "max_position_embeddings": raw.positions,
    }
    return documents.convert(values, TextConfig, header.path, REMEDY)
