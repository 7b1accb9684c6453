"""Turns prompts and answers into token rows with labels. Knows no pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from microvlm.inputs.processor import Processor
from microvlm.model.microvlm import MicroVLM

IGNORED = -100
"""Label of positions without a target, as in `torch.nn.functional.cross_entropy`."""
CAPTION_PROMPTS = (
    "describe the image",
    "what is this?",
    "what is in the picture?",
    "name this object",
    "what do you see?",
)
"""The first is the prompt of `microvlm caption`."""


def labelled_rows(
    parts: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(prompt's ids, answer's ids) -> input_ids, attention_mask, labels, each int64 [B, S], padded on the right.

    labels[t] is the token that position t must predict; on prompt and padding it is IGNORED. An answer's last token is
    only predicted.
    """
    shape = len(parts), max(len(head) + len(tail) - 1 for head, tail in parts)
    ids, mask, labels = (np.full(shape, fill) for fill in (pad_id, 0, IGNORED))
    for row, (head, tail) in enumerate(parts):
        start, end = len(head), len(head) + len(tail) - 1
        ids[row, :start], ids[row, start:end] = head, tail[:-1]
        mask[row, :end] = 1
        labels[row, start - 1 : end] = tail
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels)


class TextRows:
    """Makes padded token rows: image placeholders, prompt, answer, end token; only the answer has labels."""

    def __init__(self, processor: Processor):
        self.processor = processor
        self._cache: dict[tuple[str, bool], list[int]] = {}
        self._answers: dict[tuple[str, bool], list[int]] = {}

    def prompt_ids(self, prompt: str, image: bool) -> list[int]:
        """Token ids of the inference template, with the image token expanded, or without one."""
        key = (prompt, image)
        if key not in self._cache:
            self._cache[key] = self.processor.prompt_ids(prompt, int(image))
        return self._cache[key]

    def answer_ids(self, answer: str, after_blank: bool = False) -> list[int]:
        """Token ids of an answer, perhaps with a blank before it, and the end token."""
        key = (answer, after_blank)
        if key not in self._answers:
            self._answers[key] = [*self.processor.text_ids(answer, after_blank), self.processor.eos_id]
        return self._answers[key]

    def rows(self, samples: Sequence[tuple[str, str]], image: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(prompt, answer) pairs -> input_ids, attention_mask, labels, as `labelled_rows` makes them."""
        parts = [(self.prompt_ids(prompt, image), self.answer_ids(answer)) for prompt, answer in samples]
        return labelled_rows(parts, self.processor.pad_id)

    def embedded(
        self, model: MicroVLM, samples: list[tuple[str, str]], prefixes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embedded rows [B, S, H], mask and labels. `prefixes` [B, k, H] give each prompt an image; None gives none."""
        device = model.memory_prior.device
        ids, mask, labels = (part.to(device) for part in self.rows(samples, prefixes is not None))
        if prefixes is None:
            return model.embed(ids), mask, labels
        return model.place_images(ids, self.processor.image_id, prefixes), mask, labels
