"""Which parts of a picture each word of an answer rests on: what hiding a part does to the word's probability.

Occlusion (Zeiler and Fergus 2014, arXiv 1311.2901): a square of 2 x 2 cells of a grid is painted in the picture's mean
colour, at every place, and the answer is scored again. A cell's evidence is the mean over the squares that cover it.
Needs no attention weights and no gradients, so every backend can do it, at the cost of a prefill per place.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from microvlm.commands.heatmap import WordMap, split_words
from microvlm.generation import Prompt, place_images, read_slot, teacher_force
from microvlm.inputs.processor import Inputs, Processor
from microvlm.runtime import Memories, Runtime

GRID, SQUARE = 8, 2
"""Cells of the picture's side (fewer where the model has fewer patches), and of a square's. Smaller squares hide too
little of an object to matter."""
_BATCH = 8
FLOOR = 0.7
"""Nats that are at least drawn as full: a word that stays half as likely whatever is hidden has a flat map."""
LEGEND = (
    "Bright: how many nats the word's log-probability falls when squares here are painted over, on one scale for "
    f"all words, full at {FLOOR} or more. The numbers: the word's probability, and with its most important square "
    "painted over."
)


def read_evidence(
    runtime: Runtime,
    processor: Processor,
    inputs: Inputs,
    tokens: list[int],
    memory: Memories | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[WordMap]:
    """One map per word of the answer `tokens`, for batch 1 with one image: the falls of log-probability, in nats.

    progress : called with the number of scored pictures and their total.
    """
    assert inputs.pixel_values is not None
    if not tokens:
        return []
    pixels, side = inputs.pixel_values, runtime.config.vision.image_size
    cells = min(GRID, side // runtime.config.vision.patch_size)
    edges = [round(side * edge / cells) for edge in range(cells + 1)]
    squares = _squares(cells)
    views = [pixels]
    for rows, columns in squares:
        hidden = pixels.copy()
        area = (slice(edges[rows.start], edges[rows.stop]), slice(edges[columns.start], edges[columns.stop]))
        hidden[:, :, *area] = pixels.mean((2, 3), keepdims=True)
        views.append(hidden)
    scores = []
    for start in range(0, len(views), _BATCH):
        part = np.concatenate(views[start : start + _BATCH])
        scores.append(_score(runtime, processor, inputs, part, tokens, memory))
        progress(min(start + _BATCH, len(views)), len(views))
    scored = np.concatenate(scores)
    maps = []
    for word, members in split_words(processor, tokens):
        whole, hidden_words = scored[0, members].sum(), scored[1:, members].sum(1)
        falls, covered = np.zeros((cells, cells), np.float32), np.zeros((cells, cells), np.float32)
        for area, score in zip(squares, hidden_words, strict=True):
            falls[area] += whole - score
            covered[area] += 1
        note = f": {np.exp(whole):.2f}, {np.exp(min(hidden_words.min(), whole)):.2f} without"
        maps.append(WordMap(word, np.maximum(falls / covered, 0), note))
    return maps


def _squares(cells: int) -> list[tuple[slice, slice]]:
    """Rows and columns of every square, also of those that the picture's edges cut: each cell is in as many."""
    spans = [slice(max(0, start), min(cells, start + SQUARE)) for start in range(1 - SQUARE, cells)]
    return [(rows, columns) for rows in spans for columns in spans]


def _score(
    runtime: Runtime,
    processor: Processor,
    inputs: Inputs,
    pixels: np.ndarray,
    tokens: list[int],
    memory: Memories | None,
) -> np.ndarray:
    """Log-probabilities [B, T] of the answer's tokens for each of the pictures [B, 3, side, side]."""
    count = len(pixels)
    ids = np.repeat(inputs.input_ids, count, 0)
    embeds = np.repeat(runtime.embed_tokens(inputs.input_ids), count, 0)
    embeds = place_images(embeds, ids, processor.image_id, runtime.encode_image(np.ascontiguousarray(pixels)))
    prompt = Prompt(embeds, np.repeat(inputs.attention_mask, count, 0))
    answers = np.repeat(np.array([tokens], np.int64), count, 0)
    logits = teacher_force(runtime, prompt, answers, read_slot(runtime, prompt, memory)).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logits, answers[:, :, None], 2)[:, :, 0]
