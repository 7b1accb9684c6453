"""Lists of words, and which of two halves a text belongs to: decided by its hash, the same for ever."""

from __future__ import annotations

import hashlib


def text_hash(purpose: str, text: str) -> int:
    """A whole number of 64 bits; `purpose` makes the choices of two lists independent."""
    return int.from_bytes(hashlib.sha256(f"{purpose}|{text}".encode()).digest()[:8], "big")


def is_held_out(purpose: str, text: str) -> bool:
    """Whether the text belongs to the held-out half."""
    return text_hash(purpose, text) % 2 == 1


def words(text: str) -> list[str]:
    """The words of a text, for lists that are read better as a text."""
    return text.split()
