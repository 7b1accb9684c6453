"""Texts that a model writes by itself, to distil it where there is no text (LLM-QAT, arXiv 2305.17888, section 3.1).

A text begins with a random token that starts a word, and goes on as the model draws it at temperature 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from microvlm.atomic import new_file
from microvlm.errors import UserError
from microvlm.generation import GenerationOptions, Prompt, generate
from microvlm.loaded_model import LoadedModel

BATCH = 16
"""Texts that are drawn together."""


def write_sampled(
    model: LoadedModel,
    path: Path,
    tokens: int,
    length: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write texts of `length` tokens, `tokens` in all, as JSON lines -> their number. The file appears whole.

    Raises UserError for a length that the model's positions do not hold.
    """
    most = model.config.text.max_position_embeddings - 1
    if not 2 <= length <= most:
        raise UserError(f"--length is {length}; give 2 to {most}, the positions of this model.")
    rng = np.random.default_rng(seed)
    first = _first_tokens(model)
    count = max(1, -(-tokens // length))
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for start in range(0, count, BATCH):
            rows = min(BATCH, count - start)
            chosen = rng.choice(first, (rows, 1))
            prompt = Prompt(model.runtime.embed_tokens(chosen), np.ones_like(chosen))
            # The draws of a batch's rows have one seed: its batches differ, and its rows by how they begin.
            options = GenerationOptions(
                length - 1, temperature=1.0, seed=int(rng.integers(2**31)), stop_tokens=()
            )
            result = generate(model.runtime, prompt, options)
            for begin, rest in zip(chosen[:, 0], result.tokens, strict=True):
                text = model.processor.decode([int(begin), *rest]).strip()
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            progress(start + rows, count)
    return count


def _first_tokens(model: LoadedModel) -> np.ndarray:
    """Tokens that start a word: those that say letters behind a blank."""
    texts = ((token, model.processor.decode([token])) for token in range(model.config.text.vocab_size))
    found = [token for token, text in texts if text[:1] == " " and text[1:].isalpha()]
    if not found:
        raise UserError("no token of this model starts a word: give it texts instead.")
    return np.array(found, np.int64)
