"""A splitting pattern of a tokenizer.json (Oniguruma) to one for Python's `re` over stand-ins (`tokenizer_pieces`).

Only what both engines read alike passes: classes of letters, numbers and spaces, sets, groups, alternatives, counts
and looking ahead. Everything else is refused, never guessed.
"""

from __future__ import annotations

import re

from microvlm.inputs.tokenizer_pieces import CASE_VARIANTS, LETTER, NUMBER, NUMERIC, SPACE, STAND_IN_BASE

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern that ByteLevel splits by under `use_regex`."""

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


def translate(pattern: str, ascii_flags: dict[str, int]) -> str:
    """The pattern for the replaced text. `ascii_flags`: classes of the 128 that stay. Raises Inexpressible."""
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
            members = _members(_CLASSES[text], ascii_flags)
            text = members if in_set else f"[{members}]"
        elif kind == "not_space":
            text = f"[^{_members(SPACE, ascii_flags)}]"
        elif kind in ("set", "set_end"):
            in_set = kind == "set"
        elif in_set and kind == "count":
            text = re.escape(text)
        translated.append(text)
        place = token.end()
    return "".join(translated)


def _members(flag: int, ascii_flags: dict[str, int]) -> str:
    """The members of a character class, written to stand inside brackets."""
    own = [re.escape(letter) for letter, flags in ascii_flags.items() if flags & flag]
    # Both of these are letters, in every version of Unicode.
    folded = CASE_VARIANTS if flag == LETTER else ()
    stand_ins = [chr(STAND_IN_BASE + flags) for flags in range(16) if flags & flag]
    return "".join([*own, *folded, *stand_ins])
