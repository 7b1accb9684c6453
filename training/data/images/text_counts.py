"""Counts of a data set's texts: how many, how long, of how many words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain

_WORD = re.compile(r"\w+(?:'\w+)?")
MAX_VOCABULARY = 1_000_000
"""Words that are told apart."""


def count_texts(groups: Iterable[Iterator[str]]) -> dict[str, float | int]:
    """Texts, words a text (mean and most), and different words of lower case, of which `MAX_VOCABULARY` are counted."""
    texts = words = longest = 0
    vocabulary: set[str] = set()
    for text in chain.from_iterable(groups):
        found = _WORD.findall(text.lower())
        texts, words, longest = texts + 1, words + len(found), max(longest, len(found))
        if len(vocabulary) < MAX_VOCABULARY:
            vocabulary.update(found)
    mean = round(words / texts, 2) if texts else 0.0
    return {"texts": texts, "words_mean": mean, "words_most": longest, "vocabulary": len(vocabulary)}
