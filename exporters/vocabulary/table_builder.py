"""tokenizer.json -> the tables of `microvlm.inputs.tokenizer_tables`, kept only when they repeat the library.

What the tables cannot express is a reason in words, not an error: such a tokenizer runs by the library on the device.
Needs `tokenizers` and no torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from tokenizers import Regex, normalizers, pre_tokenizers

from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.inputs.tokenizer import LibraryTokenizer, read_tokenizer
from microvlm.inputs.tokenizer_document import (
    AddedToken,
    BpeModel,
    ModelOptions,
    Step,
    merge_pairs,
    parse_tokenizer,
)
from microvlm.inputs.tokenizer_patterns import (
    DIGIT,
    DIGITS,
    GPT2_PATTERN,
    KNOWN_PATTERNS,
    Inexpressible,
    translate,
)
from microvlm.inputs.tokenizer_pieces import COMPOSES, LETTER, NUMBER, NUMERIC, SPACE
from microvlm.inputs.tokenizer_steps import reason_for_a_child
from microvlm.inputs.tokenizer_tables import TABLES, TABLES_FORMAT, TOKENIZER, TableTokenizer

PROBES = 400
_ASSIGNED = (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE0200))
"""Code points that Unicode may have classes for: planes 4 to 13 are empty, 15 and 16 private."""
_CHUNK = 4096
"""Code points a call: the library's time grows with the square."""


def write_tables(tokenizer_json: Path, folder: Path) -> str | None:
    """Write FOLDER/tokenizer_tables.safetensors. Returns None, or why this tokenizer needs the library."""
    try:
        document = read_tokenizer(tokenizer_json)
        content = build_tables(document)
        # The library runs it here for the comparison.
        reason = reason_for_a_child(document, tokenizer_json)
        if reason:
            return reason
        library = LibraryTokenizer.from_file(tokenizer_json)
    except Inexpressible as problem:
        return str(problem)
    except (UserError, LookupError, ValueError):
        return "tokenizer.json is damaged"
    path = folder / TABLES
    path.write_bytes(content)
    tables = TableTokenizer.open(path)
    for text in probe_texts(PROBES, list(tables.added_tokens)):
        if tables.encode(text) != library.encode(text):
            path.unlink()
            return "the tables give other ids than the library for some text"
    return None


def build_tables(document: bytes) -> bytes:
    """The file's bytes from tokenizer.json's. Raises Inexpressible, UserError, LookupError and ValueError."""
    raw = parse_tokenizer(document, TOKENIZER)
    require_plain_bpe(raw.options(TOKENIZER))
    model = raw.bpe(TOKENIZER)
    require_all_bytes(model.vocab)
    normalizer = _normalizer(raw.normalizer)
    patterns = [_translate(pattern) for pattern in _patterns(raw.pre_tokenizer)]
    decoder = raw.decoder.type if raw.decoder is not None else None
    if decoder != "ByteLevel":
        raise Inexpressible(f"its decoder is {decoder}")
    added = [_added_token(token, normalizer) for token in raw.added_tokens]
    starts, flags = character_classes()
    tensors = {
        **_vocabulary(model, added),
        **_merges(model),
        "class_starts": starts,
        "class_flags": flags,
    }
    facts = {
        "format": TABLES_FORMAT,
        "source_sha256": hashlib.sha256(document).hexdigest(),
        "source_bytes": len(document),
        "added_tokens": added,
        "patterns": patterns,
        "normalizer": normalizer,
    }
    return save(tensors, metadata={"tokenizer": json.dumps(facts)})


def byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: the visible letter that stands for each byte in a byte-level vocabulary -> the byte."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + place): b for place, b in enumerate(hidden)}


def require_plain_bpe(options: ModelOptions) -> None:
    """Raises Inexpressible unless a model is a byte-level BPE without options."""
    if options.type != "BPE":
        raise Inexpressible(f"its model is {options.type} and not BPE")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if getattr(options, key):
            raise Inexpressible(f"its model uses {key}")


def require_all_bytes(vocab: dict[str, int]) -> None:
    """Raises Inexpressible for a vocabulary that lacks a byte."""
    if any(letter not in vocab for letter in byte_of_letter()):
        raise Inexpressible("its vocabulary lacks some byte")


def _normalizer(step: Step | None) -> str | None:
    if step is None:
        return None
    if step.type == "Sequence" and len(step.normalizers) <= 1:
        return _normalizer(step.normalizers[0] if step.normalizers else None)
    if step.type != "NFC":
        raise Inexpressible(f"its normalizer is {step.type}")
    return "NFC"


def _translate(pattern: str) -> str:
    translated = translate(pattern)
    if pattern not in KNOWN_PATTERNS:
        raise Inexpressible(f"its pattern {quote(pattern)} is not a known one, and might take unlimited time")
    return translated


def _patterns(pre_tokenizer: Step | None) -> Iterator[str]:
    """The patterns of a pre-tokenizer that ends with ByteLevel, each isolating its matches."""
    steps = pre_tokenizer.parts() if pre_tokenizer is not None else ()
    if not steps or steps[-1].type != "ByteLevel":
        raise Inexpressible("its pre-tokenizer does not end with ByteLevel")
    for step in steps:
        if step.type == "ByteLevel":
            if step.add_prefix_space or step is not steps[-1]:
                raise Inexpressible("its ByteLevel step adds a space or is followed by another")
            if step.use_regex:
                yield GPT2_PATTERN
        elif step.type == "Digits":
            yield DIGIT if step.individual_digits else DIGITS
        elif step.type == "Split":
            if step.behavior != "Isolated" or step.invert or not step.expression:
                raise Inexpressible(
                    "its Split step does something else than isolate the matches of a pattern"
                )
            yield step.expression
        else:
            raise Inexpressible(f"its pre-tokenizer has a {step.type} step")


def _added_token(token: AddedToken, normalizer: str | None) -> dict[str, Any]:
    if token.lstrip or token.rstrip or token.single_word:
        raise Inexpressible(f"its token '{token.content}' takes the space around it, or stands only alone")
    if token.normalized and normalizer and not token.content.isascii():
        raise Inexpressible(f"its token '{token.content}' is itself normalised")
    return {key: getattr(token, key) for key in ("id", "content", "special", "normalized")}


def _vocabulary(model: BpeModel, added: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    to_byte = byte_of_letter()
    number_of = {**model.vocab, **{token["content"]: token["id"] for token in added}}
    contents = {number: token for token, number in number_of.items()}
    if len(contents) != len(number_of) or max(contents) != len(contents) - 1:
        raise Inexpressible("its ids have gaps or are given twice")
    texts = [
        # Text that is not byte-level is read by the decoder as it stands.
        bytes(to_byte[c] for c in token) if all(c in to_byte for c in token) else token.encode()
        for token in (contents[number] for number in range(len(contents)))
    ]
    tensors: dict[str, np.ndarray] = {
        "byte_tokens": np.array(
            [model.vocab[c] for c, _ in sorted(to_byte.items(), key=lambda x: x[1])], np.uint32
        ),
        "token_ends": np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.uint32),
        "token_bytes": np.frombuffer(b"".join(texts), np.uint8),
    }
    if model.ignore_merges:
        words = sorted(model.vocab.values(), key=lambda number: texts[number])
        tensors["sorted_tokens"] = np.array(words, np.uint32)
    return tensors


def _merges(model: BpeModel) -> dict[str, np.ndarray]:
    vocab = model.vocab
    # Of a pair that is listed twice the library keeps the later turn.
    merges = {
        vocab[left] << 32 | vocab[right]: (rank, vocab[left + right])
        for rank, (left, right) in enumerate(merge_pairs(model.merges))
    }
    pairs = np.array(sorted(merges), np.uint64)
    values = np.array([merges[int(pair)] for pair in pairs], np.uint32).reshape(-1, 2)
    return {
        "merge_pairs": pairs,
        "merge_ranks": values[:, 0].copy(),
        "merge_results": values[:, 1].copy(),
    }


@functools.cache
def character_classes() -> tuple[np.ndarray, np.ndarray]:
    """(starts uint32 [C], flags uint8 [C]) of every code point, as the installed `tokenizers` library sees it."""
    flags = np.zeros(0x110000, np.uint8)
    for flag, step in (
        (LETTER, pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated")),
        (NUMBER, pre_tokenizers.Split(Regex(r"\p{N}+"), "isolated")),
        (SPACE, pre_tokenizers.Split(Regex(r"\s+"), "isolated")),
        (NUMERIC, pre_tokenizers.Digits(individual_digits=False)),
    ):
        for first in range(0, len(_ASSIGNED), _CHUNK):
            chunk = np.array(_ASSIGNED[first : first + _CHUNK])
            # Runs alternate between matches and the rest, from the control character in front, which is none.
            runs = step.pre_tokenize_str("\0" + "".join(map(chr, chunk.tolist())))
            for _, (start, end) in runs[1::2]:
                flags[chunk[start - 1 : end - 1]] |= flag
    for letter in _composing():
        flags[ord(letter)] |= COMPOSES
    starts = np.flatnonzero(np.diff(flags.astype(np.int16), prepend=-1)).astype(np.uint32)
    return starts, flags[starts]


def _composing() -> set[str]:
    """Code points that NFC replaces, joins or moves. A line break is neither, so it can separate the trials."""
    trials = [chr(number) for number in _ASSIGNED if chr(number) != "\n"]
    decomposed = normalizers.NFD().normalize_str("\n".join(trials)).split("\n")
    active: set[str] = set()
    for letter, parts in zip(trials, decomposed, strict=True):
        if parts != letter:
            active.update(letter, *parts)
    # Marks above and below in the wrong order change places, unless a character other than a mark is between them.
    between = [f"\u0301{letter}\u0323" for letter in trials]
    ordered = normalizers.NFC().normalize_str("\n".join(between)).split("\n")
    active.update(t for t, before, after in zip(trials, between, ordered, strict=True) if before != after)
    return active


_SCRIPTS = (
    (0x20, 0x7F), (0x20, 0x7F), (0x09, 0x0E), (0x80, 0x250), (0x300, 0x370), (0x370, 0x530), (0x5D0, 0x700),
    (0x900, 0xA00), (0xE00, 0xE80), (0x1100, 0x1200), (0x1E00, 0x2100), (0x2150, 0x2190), (0x2460, 0x2500),
    (0x3000, 0x3100), (0x4E00, 0x5000), (0xAC00, 0xAE00), (0xE000, 0xE020), (0xFE00, 0xFE10), (0xFF00, 0xFF60),
    (0x1D400, 0x1D800), (0x1F300, 0x1F700), (0x20000, 0x20100), (0x10FF00, 0x110000),
)  # fmt: skip
_PIECES = (
    "it's", "THEY'LL", "o'\u017f", "don't", "'re", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2003", "12345",
    "the quick brown fox", "def f(x):\n    return x", "https://example.org/?q=1&r=2", "<|", "|>", "...", "e\u0301",
    "\u0301\u0323", "\U0001f469\u200d\U0001f692", "\U0001f1e9\U0001f1ea", "\u212a", "\x1c\x1f\x85", "\ufdfa", "Ⅷ½",
)  # fmt: skip


def probe_texts(count: int, added: list[str], seed: int = 0) -> Iterator[str]:
    """Random texts of many scripts, of spaces, marks, contractions and the added tokens; the same for a seed."""
    rng = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 12)):
            kind = rng.random()
            if kind < 0.6:
                low, high = rng.choice(_SCRIPTS)
                parts.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 6))))
            elif kind < 0.95 or not added:
                parts.append(rng.choice(_PIECES) * rng.choice((1, 1, 1, 5)))
            else:
                parts.append(rng.choice(added))
        yield "".join(parts)
