"""tokenizer.json -> the mapped tables of `microvlm.inputs.tokenizer_tables`, kept only when they repeat the library.

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
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from microvlm.exporters.vocabulary.patterns import GPT2_PATTERN, Inexpressible, translate
from microvlm.inputs.tokenizer_pieces import COMPOSES, LETTER, NUMBER, NUMERIC, SPACE
from microvlm.inputs.tokenizer_tables import TABLES, TABLES_FORMAT, TableTokenizer

PROBES = 400
_ASSIGNED = (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE0200))
"""Code points that Unicode may have classes for: planes 4 to 13 are empty, 15 and 16 private."""
_CHUNK = 4096
"""Code points a call: the library's time grows with the square."""


def write_tables(tokenizer_json: Path, folder: Path) -> str | None:
    """Write FOLDER/tokenizer_tables.safetensors. Returns None, or why this tokenizer needs the library."""
    document = tokenizer_json.read_bytes()
    try:
        library = Tokenizer.from_str(document.decode())
        content = build_tables(document)
    except Inexpressible as reason:
        return str(reason)
    except Exception:  # tokenizers raises plain Exception for a file that it cannot read either
        return "tokenizer.json is damaged"
    path = folder / TABLES
    path.write_bytes(content)
    tables = TableTokenizer.open(path)
    for text in probe_texts(PROBES, list(tables.added_tokens)):
        if tables.encode(text) != library.encode(text, add_special_tokens=False).ids:
            path.unlink()
            return "the tables give other ids than the library for some text"
    return None


def build_tables(document: bytes) -> bytes:
    """The file's bytes from tokenizer.json's. Raises Inexpressible."""
    raw = json.loads(document)
    model = raw["model"]
    require_plain_bpe(model)
    normalizer = _normalizer(raw.get("normalizer"))
    patterns = [translate(pattern, class_of_ascii()) for pattern in _patterns(raw.get("pre_tokenizer"))]
    decoder = raw.get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        raise Inexpressible(f"its decoder is {decoder.get('type')}")
    added = [_added_token(token, normalizer) for token in raw.get("added_tokens", [])]
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


def merge_list(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs in rank order: older files write them as one string."""
    split = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in split]


def require_plain_bpe(model: dict[str, Any]) -> None:
    """Raises Inexpressible unless `model` of a tokenizer.json is a byte-level BPE without options."""
    if model.get("type") != "BPE":
        raise Inexpressible(f"its model is {model.get('type')} and not BPE")
    for key in (
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
    ):
        if model.get(key):
            raise Inexpressible(f"its model uses {key}")
    if any(letter not in model["vocab"] for letter in byte_of_letter()):
        raise Inexpressible("its vocabulary lacks some byte")


def _normalizer(raw: dict[str, Any] | None) -> str | None:
    if raw is None:
        return None
    if raw["type"] == "Sequence":
        parts = raw["normalizers"]
        if len(parts) <= 1:
            return _normalizer(parts[0] if parts else None)
    if raw["type"] != "NFC":
        raise Inexpressible(f"its normalizer is {raw['type']}")
    return "NFC"


def _patterns(raw: dict[str, Any] | None) -> Iterator[str]:
    """The patterns of a pre-tokenizer that ends with ByteLevel, each isolating its matches."""
    steps = (raw["pretokenizers"] if raw["type"] == "Sequence" else [raw]) if raw else []
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise Inexpressible("its pre-tokenizer does not end with ByteLevel")
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            if step.get("add_prefix_space") or step is not steps[-1]:
                raise Inexpressible("its ByteLevel step adds a space or is followed by another")
            if step.get("use_regex", True):
                yield GPT2_PATTERN
        elif kind == "Digits":
            yield r"\p{Numeric}" if step["individual_digits"] else r"\p{Numeric}+"
        elif kind == "Split":
            if step["behavior"] != "Isolated" or step["invert"] or "Regex" not in step["pattern"]:
                raise Inexpressible(
                    "its Split step does something else than isolate the matches of a pattern"
                )
            yield step["pattern"]["Regex"]
        else:
            raise Inexpressible(f"its pre-tokenizer has a {kind} step")


def _added_token(raw: dict[str, Any], normalizer: str | None) -> dict[str, Any]:
    if raw["lstrip"] or raw["rstrip"] or raw["single_word"]:
        raise Inexpressible(f"its token '{raw['content']}' takes the space around it, or stands only alone")
    if raw["normalized"] and normalizer and not raw["content"].isascii():
        raise Inexpressible(f"its token '{raw['content']}' is itself normalised")
    return {key: raw[key] for key in ("id", "content", "special", "normalized")}


def _vocabulary(model: dict[str, Any], added: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    to_byte = byte_of_letter()
    number_of = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
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
            [model["vocab"][c] for c, _ in sorted(to_byte.items(), key=lambda x: x[1])], np.uint32
        ),
        "token_ends": np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.uint32),
        "token_bytes": np.frombuffer(b"".join(texts), np.uint8),
    }
    if model.get("ignore_merges"):
        words = sorted(model["vocab"].values(), key=lambda number: texts[number])
        tensors["sorted_tokens"] = np.array(words, np.uint32)
    return tensors


def _merges(model: dict[str, Any]) -> dict[str, np.ndarray]:
    vocab = model["vocab"]
    # Of a pair that is listed twice the library keeps the later turn.
    merges = {
        vocab[left] << 32 | vocab[right]: (rank, vocab[left + right])
        for rank, (left, right) in enumerate(merge_list(model))
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


def class_of_ascii() -> dict[str, int]:
    starts, flags = character_classes()
    return {chr(n): int(flags[np.searchsorted(starts, n, "right") - 1]) for n in range(128)}


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
