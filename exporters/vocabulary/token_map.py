"""How the tokens of a whole vocabulary stand to those of a smaller one that was cut from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from microvlm.inputs.tokenizer_document import merge_pairs


def token_bytes(document: dict[str, Any], size: int) -> np.ndarray:
    """Bytes of text of each token of a tokenizer.json with a byte-level BPE, int64 [size]; 0 where there is none."""
    counts = np.zeros(size, np.int64)
    for token, number in document["model"]["vocab"].items():
        counts[number] = len(token)  # each letter stands for a byte
    for token in document.get("added_tokens", []):
        counts[token["id"]] = len(token["content"].encode())
    return counts


def first_tokens(document: dict[str, Any], old_ids: Sequence[int], size: int) -> np.ndarray:
    """For each of `size` tokens, the kept one that the smaller tokenizer begins its text with, int64 [size].

    `old_ids[new id]` is the old id. A token without a text of its own (a row that fills up a table) begins with token
    0, which costs it its probability.
    """
    new_id = {old: new for new, old in enumerate(old_ids)}
    vocab = document["model"]["vocab"]
    first = np.zeros(size, np.int64)
    for old, new in new_id.items():
        first[old] = new
    # Merges build longer tokens of shorter ones, so those that a token begins with are known before it is.
    for left, right in sorted(
        merge_pairs(document["model"]["merges"]), key=lambda pair: len(pair[0] + pair[1])
    ):
        old = vocab[left + right]
        if old not in new_id:
            first[old] = first[vocab[left]]
    return first
