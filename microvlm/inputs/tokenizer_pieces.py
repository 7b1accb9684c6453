"""Splits text into the pieces that BPE works on: NFC and the patterns of a tokenizer.json, with Python's own `re`.

Python's `re` has no \\p{L}, and the set of letters depends on the Unicode version. So the tables hold the classes that
the `tokenizers` library gives every code point, and patterns run over a copy of the text in which every character
outside ASCII is replaced by a stand-in for its class. Knows no vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

LETTER, NUMBER, SPACE, NUMERIC, COMPOSES = 1, 2, 4, 8, 16
"""Class flags: \\p{L}, \\p{N} and \\s of the library's patterns, digit of its `Digits` step, changed by NFC."""
STAND_IN_BASE = 0xE000
"""A character with class flags f (below 16) is replaced by the private code point STAND_IN_BASE + f."""
CASE_VARIANTS = ("\u017f", "\u212a")
"""Long s and the Kelvin sign are not replaced, because (?i:s) and (?i:k) match them."""
CLASS_FLAGS = LETTER | NUMBER | SPACE | NUMERIC | COMPOSES
_CLASS_MASK = LETTER | NUMBER | SPACE | NUMERIC


class PieceSplitter:
    """The normaliser and the splitting patterns of one tokenizer."""

    def __init__(
        self, starts: np.ndarray, flags: np.ndarray, patterns: Sequence[str], normalizer: str | None
    ):
        """`starts` [C], ascending from 0, and `flags` [C]: the classes of the code points from each start on.

        `patterns` are written for the text of stand-ins; each cuts the pieces of the previous one into matches and the
        text between them. `normalizer` is "NFC" or None. Raises ValueError for another one.
        """
        if normalizer not in (None, "NFC"):
            raise ValueError(normalizer)
        self._starts, self._flags = starts, flags
        self._patterns = [re.compile(pattern) for pattern in patterns]
        self._composes = normalizer == "NFC"

    def normalise(self, text: str) -> str:
        """Apply NFC like the library, which leaves code points alone that are newer than its Unicode version."""
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
        """Split normalised text into pieces, whose concatenation is the text."""
        classes = self._stand_in(text)
        bounds = [0, len(text)]
        for pattern in self._patterns:
            cut = [0]
            for start, end in pairwise(bounds):
                for match in pattern.finditer(classes, start, end):
                    cut += match.span()
                cut.append(end)
            bounds = sorted(set(cut))
        return [text[start:end] for start, end in pairwise(bounds)]

    def _stand_in(self, text: str) -> str:
        if text.isascii():
            return text
        points = _code_points(text)
        is_kept = (points < 128) | np.isin(points, [ord(letter) for letter in CASE_VARIANTS])
        stand_ins = STAND_IN_BASE + (self._class_of(points) & _CLASS_MASK).astype(np.uint32)
        return np.where(is_kept, points, stand_ins).astype("<u4").tobytes().decode("utf-32-le")

    def _class_of(self, points: np.ndarray) -> np.ndarray:
        """Class flags of each code point, uint8."""
        return self._flags[np.searchsorted(self._starts, points, "right") - 1]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")
