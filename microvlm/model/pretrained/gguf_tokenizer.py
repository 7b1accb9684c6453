"""The tokenizer of a GGUF file as a tokenizer.json: a byte-level BPE vocabulary and the splits it was trained with.

The splits are those of llama.cpp's `tokenizer.ggml.pre`. Imports no torch.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.formats.headers.gguf_header import REMEDY, GgufHeader
from microvlm.inputs.tokenizer_patterns import LLAMA3_PATTERN, QWEN2_PATTERN

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_PREFIX = "tokenizer.ggml."
_GPT2, _DIGITS, _QWEN2, _LLAMA3 = "gpt2", "digits", "qwen2", "llama3"
_SPLITS = {
    "default": _GPT2, "gpt-2": _GPT2, "smollm": _DIGITS, "starcoder": _DIGITS, "refact": _DIGITS, "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "llama-bpe": _LLAMA3,
}  # fmt: skip
"""llama.cpp's name of a pre-tokenizer -> how it splits. Others are refused: a wrong split is a silently worse model."""
Id = Annotated[int, Meta(ge=0, lt=2**31)]


class _Tokenizer(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of `tokenizer.*`."""

    model: str
    pre: str = "default"
    tokens: Annotated[list[str], Meta(min_length=1)]
    types: list[int] = []
    merges: list[str] = []
    bos: Id | None = None
    eos: Id | None = None
    pad: Id | None = None
    add_bos: bool = False
    chat_template: str | None = None


_FIELDS = {
    "model": "tokenizer.ggml.model",
    "pre": "tokenizer.ggml.pre",
    "tokens": "tokenizer.ggml.tokens",
    "types": "tokenizer.ggml.token_type",
    "merges": "tokenizer.ggml.merges",
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "add_bos": "tokenizer.ggml.add_bos_token",
    "chat_template": "tokenizer.chat_template",
}


def gguf_tokenizer(header: GgufHeader) -> tuple[bytes, dict[str, Any]]:
    """(the content of tokenizer.json, that of tokenizer_config.json) of a GGUF file.

    Raises UserError for a tokenizer that cannot be converted exactly.
    """
    raw: _Tokenizer = header.record(_Tokenizer, _FIELDS)
    if raw.model != "gpt2":
        raise UserError(
            f"{header.path}: a {quote(raw.model)} tokenizer cannot be converted; give the decoder's Hugging Face "
            "folder."
        )
    if raw.pre not in _SPLITS:
        raise UserError(
            f"{header.path}: its text is split as {quote(raw.pre)}, which is not known here; give the decoder's "
            "Hugging Face folder."
        )
    document = _document(raw, header)
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass"), _tokenizer_config(raw)


def _document(raw: _Tokenizer, header: GgufHeader) -> dict[str, Any]:
    types = raw.types or [_NORMAL] * len(raw.tokens)
    if len(types) != len(raw.tokens):
        raise UserError(
            f"{header.path} has {len(raw.tokens)} tokens and {len(types)} types of them: {REMEDY}."
        )
    vocabulary: dict[str, int] = {}
    added = []
    for number, (token, kind) in enumerate(zip(raw.tokens, types, strict=True)):
        if kind == _UNUSED:  # a row that the vocabulary was filled up with
            continue
        if token in vocabulary:
            raise UserError(f"{header.path} has the token {quote(token)} twice: {REMEDY}.")
        vocabulary[token] = number
        if kind in (_CONTROL, _USER_DEFINED):
            added.append(added_token(number, token, special=kind == _CONTROL))
    merges = [merge.split(" ") for merge in raw.merges]
    if any(len(pair) != 2 for pair in merges):
        raise UserError(f"{header.path} has a merge that is no pair of tokens: {REMEDY}.")
    split = _SPLITS[raw.pre]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if split == _QWEN2 else None,
        "pre_tokenizer": _pre_tokenizer(split, byte_level),
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split == _LLAMA3,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def added_token(number: int, content: str, special: bool = True) -> dict[str, Any]:
    """The entry of tokenizer.json for a token that is matched whole, before a text is split."""
    return {
        "id": number,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _pre_tokenizer(split: str, byte_level: dict[str, Any]) -> dict[str, Any]:
    if split == _GPT2:
        return byte_level
    if split == _DIGITS:
        return {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        }
    pattern = QWEN2_PATTERN if split == _QWEN2 else LLAMA3_PATTERN
    first = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [first, {**byte_level, "use_regex": False}]}


def _tokenizer_config(raw: _Tokenizer) -> dict[str, Any]:
    names = {"bos_token": raw.bos, "eos_token": raw.eos, "pad_token": raw.pad}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": raw.add_bos}
    config |= {
        name: raw.tokens[number]
        for name, number in names.items()
        if number is not None and number < len(raw.tokens)
    }
    return config if raw.chat_template is None else {**config, "chat_template": raw.chat_template}
