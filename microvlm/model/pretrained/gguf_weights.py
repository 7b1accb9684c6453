"""The tensors of a Llama or Qwen2 decoder in a GGUF file, under the names and in the row order of transformers.

Quantised blocks are unpacked to float32 by the `gguf` package, a tensor at a time; F32, F16 and BF16 stay as they are.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from microvlm.config import TextConfig
from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.formats.headers.gguf_header import GgufHeader, GgufTensor
from microvlm.model.pretrained.gguf_config import EMBEDDING, architecture
from microvlm.model.pretrained.stored_weights import PartWeights, read_range
from microvlm.model.tensor_writer import LazyTensor

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_TOP = {EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROWS_AT_ONCE = 4096
"""Rows that are unpacked together: the package's temporary arrays are several times their size."""


def gguf_weights(header: GgufHeader, text: TextConfig) -> PartWeights:
    """The tensors of a decoder with the configuration `text`. Raises UserError for a type that cannot be unpacked."""
    interleaved = architecture(header) == "llama"
    tensors: dict[str, LazyTensor] = {}
    for name, stored in header.tensors.items():
        if name.startswith("rope_freqs"):
            continue
        tensor = LazyTensor(
            stored.shape,
            _FLOATS.get(stored.type.name, torch.float32),
            partial(_read, header.path, name, stored),
        )
        leaf = name.split(".")[-2] if name.startswith("blk.") else ""
        heads = {"attn_q": text.num_attention_heads, "attn_k": text.num_key_value_heads}.get(leaf)
        if interleaved and heads:
            tensor = tensor.converted(partial(halves_of_heads, heads=heads))
        tensors[_name(name)] = tensor
    return PartWeights(str(header.path), tensors)


def halves_of_heads(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k in pairs, as llama.cpp rotates Llama's, -> in halves, as transformers does; the same shape.

    Rows that do not fit the heads are left as they are, for a later comparison of shapes.
    """
    if weight.shape[0] % (2 * heads):
        return weight
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _name(name: str) -> str:
    """A name of llama.cpp as transformers has it; another one stays, and is refused as unexpected."""
    if not name.startswith("blk.") or name.count(".") != 3:
        return _TOP.get(name, name)
    _, index, part, leaf = name.split(".")
    return f"model.layers.{index}.{_LAYER[part]}.{leaf}" if part in _LAYER else name


def _read(path: Path, name: str, stored: GgufTensor) -> Tensor:
    kind = stored.type.name
    if kind in _FLOATS:
        content = read_range(path, stored.start, stored.nbytes)
        return torch.frombuffer(content, dtype=_FLOATS[kind]).reshape(stored.shape)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    columns = stored.shape[-1]
    rows = int(np.prod(stored.shape[:-1], dtype=np.int64))
    row_bytes = columns // stored.type.size * stored.type.nbytes
    result = np.empty((rows, columns), np.float32)
    try:
        for first in range(0, rows, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, rows - first)
            content = read_range(path, stored.start + first * row_bytes, count * row_bytes)
            blocks = np.frombuffer(content, np.uint8).reshape(count, row_bytes)
            with np.errstate(all="ignore"):  # of damaged scales, which are numbers like any other to a model
                result[first : first + count] = dequantize(blocks, GGMLQuantizationType[kind])
    except NotImplementedError:
        raise UserError(
            f"{path}: {quote(name)} is stored as {kind}, which the installed gguf package cannot unpack: "
            "take another file."
        ) from None
    return torch.from_numpy(result).reshape(stored.shape)
