"""GGUF files with random weights in a decoder's shape, written once: speed does not depend on the values of weights.

Types are chosen as llama.cpp's own quantiser does: a ternary type packs 256 weights of a row together, so rows of
another length get Q4_0, as does the token table. The vocabulary is made up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from microvlm.atomic import new_file
from microvlm.config import TextConfig
from microvlm.errors import UserError
from microvlm.sources.cache_directory import writable_cache

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

KINDS = ("Q4_0", "TQ2_0", "TQ1_0")
"""Of the layers' matrices: 4.5 bits a weight, and ternary with 2.06 and 1.69."""
_FALLBACK = "Q4_0"
_ROWS_AT_ONCE = 8192
_FIRST_TOKENS = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)))
_UNKNOWN, _CONTROL, _BYTE, _NORMAL = 2, 3, 6, 1
"""Types of tokens in llama.cpp."""


def random_gguf(text: TextConfig, kind: str, log: Callable[[str], None] = lambda _: None) -> Path:
    """The file of a shape, in the cache. Raises UserError for a shape that GGUF has no words for."""
    shape = f"{text.num_hidden_layers}x{text.hidden_size}x{text.intermediate_size}-{text.vocab_size}"
    path = writable_cache("peers") / f"random-{shape}-{kind}.gguf"
    if not path.is_file():
        log(f"writing {path.name}, once")
        with new_file(path) as temporary:
            write_random_gguf(temporary, text, kind)
    return path


def write_random_gguf(path: Path, text: TextConfig, kind: str) -> None:
    """Write a Qwen2 (with biases) or Llama decoder of `text`'s sizes. Needs the gguf package. Raises UserError."""
    from gguf import GGUFWriter

    if text.sub_norm:
        raise UserError("GGUF has no decoder with norms before its output products: give another shape.")
    if text.vocab_size <= len(_FIRST_TOKENS):
        raise UserError(
            f"the vocabulary has {text.vocab_size} tokens, and llama.cpp's needs {len(_FIRST_TOKENS) + 1}: "
            "give another shape."
        )
    writer = GGUFWriter(path, "qwen2" if text.attention_bias else "llama")
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    _add_vocabulary(writer, text.vocab_size)
    _add_tensors(writer, text, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: GGUFWriter, size: int) -> None:
    first = len(_FIRST_TOKENS)
    types = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256, *[_NORMAL] * (size - first)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*_FIRST_TOKENS, *(f"t{number}" for number in range(first, size))])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add_tensors(writer: GGUFWriter, text: TextConfig, kind: str) -> None:
    hidden, inner, key_width = text.hidden_size, text.intermediate_size, text.kv_width
    query_width = text.num_attention_heads * text.head_dim
    products = {
        "attn_q": (query_width, hidden),
        "attn_k": (key_width, hidden),
        "attn_v": (key_width, hidden),
        "attn_output": (hidden, query_width),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    made: dict[tuple[int, int], tuple[np.ndarray, GGMLQuantizationType]] = {}

    def add(name: str, shape: tuple[int, int], wanted: str) -> None:
        # Layers of one shape have equal values, and each its own bytes in the file.
        if shape not in made:
            made[shape] = _random_blocks(shape, wanted)
        blocks, stored = made[shape]
        writer.add_tensor(name, blocks, raw_dtype=stored)

    ones = np.ones(hidden, np.float32)
    writer.add_tensor("output_norm.weight", ones)
    add("token_embd.weight", (text.vocab_size, hidden), _FALLBACK)
    for layer in range(text.num_hidden_layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", ones)
        for name, shape in products.items():
            add(f"blk.{layer}.{name}.weight", shape, kind)
            if text.attention_bias and name in ("attn_q", "attn_k", "attn_v"):
                writer.add_tensor(f"blk.{layer}.{name}.bias", np.zeros(shape[0], np.float32))


def _random_blocks(shape: tuple[int, int], wanted: str) -> tuple[np.ndarray, GGMLQuantizationType]:
    """(uint8 [rows, bytes of a row], the type that it has) of random weights [rows, columns]."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quantize

    rows, columns = shape
    kind = GGMLQuantizationType[wanted]
    if columns % GGML_QUANT_SIZES[kind][0]:
        kind = GGMLQuantizationType[_FALLBACK]
    random = np.random.default_rng(0)
    parts = []
    for first in range(0, rows, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, rows - first)
        parts.append(quantize(random.standard_normal((count, columns), np.float32) * 0.02, kind))
    return np.concatenate(parts), kind
