"""Makes untrusted text safe to print on a terminal."""

from __future__ import annotations

import unicodedata

_CONTROL_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")
_DIRECTION_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """`text` on one line: control characters, line ends and marks of writing direction become escapes."""
    return "".join(_escape(char) if _is_control(char) else char for char in text)


def printable_lines(text: str) -> str:
    """`text` with its lines and tabs; the other characters that `printable` escapes become escapes."""
    if text.isprintable():
        return text
    return "".join(_escape(char) if _is_control(char) and char not in "\n\t" else char for char in text)


def printable_json(document: str) -> str:
    """A JSON document with the same value, in which those characters are escapes of JSON."""
    if document.isprintable():
        return document
    return "".join(f"\\u{ord(char):04x}" if _is_control(char) and char != "\n" else char for char in document)


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in _CONTROL_CATEGORIES or char in _DIRECTION_MARKS


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
