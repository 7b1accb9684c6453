"""The splitting patterns that are run on a user's text, and their translation from Oniguruma to Python's `re`.

A pattern comes from a file, and a pattern can take exponential time. So only known ones run in this process: those
whose time grows with the length of the text, by name below. `translate` writes a pattern of a tokenizer.json for the
text of stand-ins (`tokenizer_pieces`); only what both engines read alike passes: classes of letters, numbers and
spaces, sets, groups, alternatives, counts and looking ahead. Everything else is refused, never guessed.
"""

from __future__ import annotations

import functools
import re
import string

from microvlm.inputs.tokenizer_pieces import CASE_VARIANTS, LETTER, NUMBER, NUMERIC, SPACE, STAND_IN_BASE

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern that ByteLevel splits by under `use_regex`."""
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2, Qwen2.5 and Qwen3: one digit a piece."""
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")
"""Llama 3 and the tokenizers that were converted from cl100k: up to three digits a piece."""
DIGIT, DIGITS = r"\p{Numeric}", r"\p{Numeric}+"
"""The step `Digits` (SmolLM, StarCoder) with and without `individual_digits`."""
KNOWN_PATTERNS = frozenset({GPT2_PATTERN, QWEN2_PATTERN, LLAMA3_PATTERN, DIGIT, DIGITS})

_CLASSES = {r"\p{L}": LETTER, r"\p{N}": NUMBER, r"\s": SPACE, r"\p{Numeric}": NUMERIC}
_PLAIN = r"[\w\-<>/'\"@%=,:;!#~` ]"
_TOKEN = re.compile(
    r"(?P<class>\\p\{L\}|\\p\{N\}|\\p\{Numeric\}|\\s)"
    r"|(?P<not_space>\\S)"
    r"|(?P<escape>\\[rntfv]|\\[^\w\s])"
    r"|(?P<set>\[\^?)"
    r"|(?P<set_end>\])"
    r"|(?P<group>\(\?:|\(\?i:|\(\?!|\(\?=|\((?!\?)|\)|\|)"
    r"|(?P<count>(?:[?*+]|\{\d+(?:,\d*)?\})(?![?*+{]))"
    rf"|(?P<plain>{_PLAIN})"
)


class Inexpressible(Exception):
    """Why a tokenizer cannot be put into tables, as the end of a sentence."""


@functools.cache
def translated_patterns() -> frozenset[str]:
    """The known patterns as `translate` writes them: tables with another one are not run."""
    return frozenset(map(translate, KNOWN_PATTERNS))


def translate(pattern: str) -> str:
    """The pattern for the text of stand-ins. Raises Inexpressible."""
    translated, place, in_set = [], 0, False
    while place < len(pattern):
        token = _TOKEN.match(pattern, place)
        kind = token.lastgroup if token else None
        if token is None or (in_set and kind in ("set", "group", "not_space")):
            if in_set and token is not None and kind == "group" and token[0] in "()|":
                translated.append(re.escape(token[0]))
                place = token.end()
                continue
            raise Inexpressible(f"its pattern has '{pattern[place : place + 8]}'")
        text = token[0]
        if kind == "class":
            members = _members(_CLASSES[text])
            text = members if in_set else f"[{members}]"
        elif kind == "not_space":
            text = f"[^{_members(SPACE)}]"
        elif kind in ("set", "set_end"):
            in_set = kind == "set"
        elif in_set and kind == "count":
            text = re.escape(text)
        translated.append(text)
        place = token.end()
    return "".join(translated)


def ascii_members(flag: int) -> str:
    """The ASCII characters of a class, which keep their place in the text of stand-ins, in ascending order."""
    members = {
        LETTER: string.ascii_letters,
        SPACE: string.whitespace,
        NUMBER: string.digits,
        NUMERIC: string.digits,
    }
    return "".join(sorted(members[flag]))


def _members(flag: int) -> str:
    """The members of a character class, written to stand inside brackets."""
    own = [re.escape(letter) for letter in ascii_members(flag)]
    # Both of these are letters, in every version of Unicode.
    folded = CASE_VARIANTS if flag == LETTER else ()
    stand_ins = [chr(STAND_IN_BASE + flags) for flags in range(16) if flags & flag]
    return "".join([*own, *folded, *stand_ins])
