"""Which tokenizer.json the `tokenizers` library may run in this process: a list of what is known to be harmless.

Harmless: its time and memory grow with the length of the text, and it fails on no text. The list holds what the models
need that this package is made for (GPT-2, Qwen2, Llama 3, SmolLM). The rest has patterns of exponential time,
replacements that multiply a text, tables that make the library panic, or models that refuse a word.
"""

from __future__ import annotations

from pathlib import Path

from microvlm.escaping import printable
from microvlm.inputs.tokenizer_document import Step, TokenizerDocument, parse_tokenizer
from microvlm.inputs.tokenizer_patterns import KNOWN_PATTERNS

_NORMALIZERS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase"})
"""Each makes at most 18 characters of one, and none of them again more of what another one made."""
_MOST_STEPS = 8
_MOST_ADDED_CHARACTERS = 1_000_000
"""Of all added tokens together: their automaton takes many times their size."""


def reason_for_a_child(document: bytes, path: Path) -> str:
    """Why the library must not run a tokenizer.json in this process; empty if it may. Raises UserError."""
    content = parse_tokenizer(document, path)
    if not KNOWN_PATTERNS.issuperset(content.expressions()):
        return "its patterns are not known"
    return (
        _reason_of_model(content, path)
        or _reason_of_normalizer(content.normalizer)
        or _reason_of_pre_tokenizer(content.pre_tokenizer)
        or _reason_of_post_processor(content.post_processor)
        or _reason_of_decoder(content.decoder)
    )


def _reason_of_model(content: TokenizerDocument, path: Path) -> str:
    options = content.options(path)
    if options.type != "BPE":
        return "its model is not BPE"
    # The library panics where such a prefix is longer than a token.
    if options.continuing_subword_prefix or options.end_of_word_suffix:
        return "its tokens have prefixes or suffixes"
    if options.unk_token is not None and options.unk_token not in content.bpe(path).vocab:
        return "its token for unknown words is missing"
    if sum(len(token.content) for token in content.added_tokens) > _MOST_ADDED_CHARACTERS:
        return "its added tokens are long"
    return ""


def _reason_of_normalizer(step: Step | None) -> str:
    return _unless_all(step, "normalizer", all(part.type in _NORMALIZERS for part in _parts(step)))


def _reason_of_pre_tokenizer(step: Step | None) -> str:
    """A second ByteLevel would write the letters of the first as bytes again, twice as many each time."""
    parts = _parts(step)
    known = all(
        part.type in ("ByteLevel", "Digits") or (part.type == "Split" and bool(part.expression))
        for part in parts
    )
    return _unless_all(step, "pre-tokenizer", known and _count(parts, "ByteLevel") <= 1)


def _reason_of_post_processor(step: Step | None) -> str:
    """A template that has the text more than once would multiply it."""
    parts = _parts(step)
    known = all(
        part.type == "ByteLevel" or (part.type == "TemplateProcessing" and _has_text_once(part))
        for part in parts
    )
    return _unless_all(step, "post-processor", known)


def _reason_of_decoder(step: Step | None) -> str:
    return "" if step is None or step.type == "ByteLevel" else f"its decoder is {printable(step.type[:40])}"


def _unless_all(step: Step | None, name: str, known: bool) -> str:
    return "" if known and len(_parts(step)) <= _MOST_STEPS else f"its {name} has steps that are not known"


def _parts(step: Step | None) -> tuple[Step, ...]:
    return () if step is None else step.parts()


def _count(parts: tuple[Step, ...], kind: str) -> int:
    return sum(part.type == kind for part in parts)


def _has_text_once(template: Step) -> bool:
    pieces = template.single if isinstance(template.single, list) else []
    return sum(isinstance(piece, dict) and "Sequence" in piece for piece in pieces) == 1
