"""Text that somebody else wrote, for a terminal: what would steer it is shown, not obeyed."""

from __future__ import annotations

import unicodedata

_STEERING = ("Cc", "Cs", "Zl", "Zp")
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """`text` in one line: control characters, line ends and signs that turn the direction of writing as escapes."""
    return "".join(_escaped(char) if _steers(char) else char for char in text)


def _steers(char: str) -> bool:
    return unicodedata.category(char) in _STEERING or char in _TURNING


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
