"""Text to the pieces that BPE works on: NFC and the splitting patterns of a tokenizer.json, by Python's own `re`.

Python's `re` knows no \\p{L}, and what a letter is depends on the Unicode version of whoever is asked. So the
tables bring the answers of the `tokenizers` library for every code point, and patterns run over a copy of the text in
which every character outside ASCII is replaced by one that stands for its class. Knows no vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

LETTER, NUMBER, SPACE, NUMERIC, COMPOSES = 1, 2, 4, 8, 16
"""Flags of a code point: \\p{L}, \\p{N}, \\s of the library's patterns, a digit of its `Digits` step, a part of NFC."""
STAND_IN_BASE = 0xE000
"""A character of class flags f is replaced by the private code point STAND_IN_BASE + f, f below 16."""
FOLDED = ("\u017f", "\u212a")
"""Stay themselves, because (?i:s) and (?i:k) match them: long s, Kelvin sign."""
_CLASS_MASK = LETTER | NUMBER | SPACE | NUMERIC


class PieceSplitter:
    """Normalisation and patterns of one tokenizer."""

    def __init__(
        self, starts: np.ndarray, flags: np.ndarray, patterns: Sequence[str], normalizer: str | None
    ):
        """`starts` [C] ascending from 0 and `flags` [C]: classes of the code points from each start on.

        `patterns`: each cuts the pieces of the one before it into matches and what lies between, and is written for
        the replaced text. `normalizer`: "NFC" or None.
        """
        if normalizer not in (None, "NFC"):
            raise ValueError(normalizer)
        self._starts, self._flags = starts, flags
        self._patterns = [re.compile(pattern) for pattern in patterns]
        self._composes = normalizer == "NFC"

    def normalise(self, text: str) -> str:
        """NFC where the library would do it: code points newer than its Unicode version stay as they are."""
        if not self._composes or text.isascii():
            return text
        from unicodedata import normalize

        active = self._class_of(_code_points(text)) & COMPOSES != 0
        edges = np.flatnonzero(np.diff(active)) + 1
        bounds = [0, *edges.tolist(), len(text)]
        return "".join(
            normalize("NFC", text[start:end]) if active[start] else text[start:end]
            for start, end in pairwise(bounds)
        )

    def split(self, text: str) -> list[str]:
        """The pieces of normalised `text`; joined they are the text."""
        seen = self._stand_in(text)
        bounds = [0, len(text)]
        for pattern in self._patterns:
            cut = [0]
            for start, end in pairwise(bounds):
                for match in pattern.finditer(seen, start, end):
                    cut += match.span()
                cut.append(end)
            bounds = sorted(set(cut))
        return [text[start:end] for start, end in pairwise(bounds)]

    def _stand_in(self, text: str) -> str:
        if text.isascii():
            return text
        points = _code_points(text)
        stays = (points < 128) | np.isin(points, [ord(letter) for letter in FOLDED])
        stand_ins = STAND_IN_BASE + (self._class_of(points) & _CLASS_MASK).astype(np.uint32)
        return np.where(stays, points, stand_ins).astype("<u4").tobytes().decode("utf-32-le")

    def _class_of(self, points: np.ndarray) -> np.ndarray:
        """uint8 flags of each code point."""
        return self._flags[np.searchsorted(self._starts, points, "right") - 1]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")
