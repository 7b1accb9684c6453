"""Token windows of a plain text, on which a decoder's perplexity is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.inputs.processor import Processor
from microvlm.training.batches.conversation_rows import ConversationRows

MAX_TEXT_BYTES = 50_000_000
TEXT_WINDOWS, WINDOW_TOKENS = 32, 128
"""Windows whose perplexity is measured, and their length."""
_PIECE, _MOST_PIECES = 20_000, 100
"""Characters that are tokenized at once, because a tokenizer's time may grow faster than its text; and how many."""


def text_windows(path: Path, processor: Processor) -> Tensor:
    """int64 [n, WINDOW_TOKENS] of a UTF-8 file, spread evenly over its first 2 million characters. Raises UserError."""
    try:
        text = documents.read_file(path, MAX_TEXT_BYTES).decode()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: give --text a text file in UTF-8.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: give --text another file.") from None
    words = ConversationRows(processor).clean(text)
    pieces = (words[at : at + _PIECE] for at in range(0, min(len(words), _MOST_PIECES * _PIECE), _PIECE))
    ids = [token for piece in pieces for token in processor.tokenizer.encode(piece)]
    count = len(ids) // WINDOW_TOKENS
    if count == 0:
        raise UserError(f"{path} has fewer than {WINDOW_TOKENS} tokens: give --text a longer text.")
    chosen = np.unique(np.linspace(0, count - 1, min(TEXT_WINDOWS, count)).round().astype(int))
    return torch.tensor([ids[at * WINDOW_TOKENS : (at + 1) * WINDOW_TOKENS] for at in chosen])
