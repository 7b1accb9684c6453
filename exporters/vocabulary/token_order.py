"""The order in which tokens are worth keeping: by their merges, by their use in texts, or by the scripts of languages.

An order lists merges, each after those that build its parts, so that any beginning of it is a vocabulary. Of a token
that several merges build, the parts of all of them come first: which of them a text meets depends on its neighbours.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from microvlm.errors import UserError
from microvlm.exporters.vocabulary.table_builder import byte_of_letter
from microvlm.inputs.tokenizer_document import merge_pairs

Pair = tuple[str, str]

_LATIN = "af az ca cs cy da de en es et eu fi fr ga gl hr hu id is it lt lv ms mt nl no pl pt ro sk sl sq sv tl tr vi"
SCRIPTS: dict[str, frozenset[str]] = {
    **dict.fromkeys(_LATIN.split(), frozenset({"LATIN"})),
    **dict.fromkeys(["be", "bg", "kk", "mk", "mn", "ru", "sr", "uk"], frozenset({"CYRILLIC"})),
    **dict.fromkeys(["ar", "fa", "ur"], frozenset({"ARABIC"})),
    **dict.fromkeys(["hi", "mr", "ne", "sa"], frozenset({"DEVANAGARI"})),
    "am": frozenset({"ETHIOPIC"}),
    "bn": frozenset({"BENGALI"}),
    "el": frozenset({"GREEK"}),
    "gu": frozenset({"GUJARATI"}),
    "he": frozenset({"HEBREW"}),
    "hy": frozenset({"ARMENIAN"}),
    "ja": frozenset({"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"}),
    "ka": frozenset({"GEORGIAN"}),
    "km": frozenset({"KHMER"}),
    "ko": frozenset({"HANGUL"}),
    "my": frozenset({"MYANMAR"}),
    "ta": frozenset({"TAMIL"}),
    "te": frozenset({"TELUGU"}),
    "th": frozenset({"THAI"}),
    "zh": frozenset({"CJK", "BOPOMOFO"}),
}
"""Language (ISO 639-1) -> its scripts, each the first word of its letters' names in Unicode."""
_OF_ALL_SCRIPTS = frozenset({"COMBINING", "MODIFIER", "VARIATION"})


def scripts_of(languages: Iterable[str]) -> frozenset[str]:
    """The scripts of languages. Raises UserError for one that is not listed."""
    scripts: frozenset[str] = frozenset()
    for language in languages:
        if language not in SCRIPTS:
            known = ", ".join(sorted(SCRIPTS))
            raise UserError(f"--language {language} is not known; choose of {known}.")
        scripts |= SCRIPTS[language]
    return scripts


def order_merges(
    model: dict[str, Any], uses: Mapping[int, int] | None = None, scripts: frozenset[str] | None = None
) -> list[Pair]:
    """Merges of tokenizer.json's `model` worth keeping, the best first.

    `uses`: how often texts have each token id. A token counts as used where one that is built of it is. `scripts`:
    tokens with letters of other scripts are left out, and so are pieces of characters that no token needs.
    """
    vocab: dict[str, int] = model["vocab"]
    pairs = merge_pairs(model["merges"])
    if uses is None and scripts is None:
        return pairs
    parts: dict[str, set[str]] = defaultdict(set)
    for left, right in pairs:
        parts[left + right] |= {left, right}
    # Parts are shorter than what they build, so each token has its own sum before it is added to its parts.
    longest_first = sorted(parts, key=len, reverse=True)
    wanted = {token for token in parts if scripts is None or _is_written_in(token, scripts)}
    total: dict[str, int] = {token: (uses or {}).get(vocab[token], 0) for token in parts}
    for token in longest_first:
        for part in parts[token]:
            if part in parts:
                total[part] += total[token]
                if token in wanted:
                    wanted.add(part)
    chosen = [(rank, pair) for rank, pair in enumerate(pairs) if "".join(pair) in wanted]
    if uses is not None:
        chosen.sort(key=lambda item: (-total["".join(item[1])], len("".join(item[1])), item[0]))
    return [pair for _, pair in chosen]


def _is_written_in(token: str, scripts: frozenset[str]) -> bool:
    """Whether every letter of a byte-level token is of one of the scripts. A piece of a character is not."""
    to_byte = byte_of_letter()
    try:
        text = bytes(to_byte[letter] for letter in token).decode()
    except UnicodeDecodeError:
        return False
    return all(
        unicodedata.category(letter)[0] not in "LM"
        or unicodedata.name(letter, "").partition(" ")[0] in scripts | _OF_ALL_SCRIPTS
        for letter in text
    )
