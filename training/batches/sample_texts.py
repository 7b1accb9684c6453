"""Text of the training samples: prompts, questions, and token rows with their labels. No pixels here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from microvlm.inputs.processor import Processor
from microvlm.memory.ordinal_questions import ORDINALS, ordinal_question
from microvlm.model.microvlm import MicroVLM
from microvlm.training.data.emoji import EmojiData
from microvlm.training.data.scenes import GROUNDS, NUMBERS, read_scene_objects

IGNORED = -100
CAPTION_PROMPTS = (
    "describe the image",
    "what is this?",
    "what is in the picture?",
    "name this object",
    "what do you see?",
)
"""The first is the one that `microvlm caption` uses."""


def corpus(emoji: EmojiData) -> list[str]:
    """Every text the model may meet, for the tokenizer: all captions (names are no labels), prompts, questions."""
    lines = [*emoji.captions, *(" " + caption for caption in emoji.captions), *CAPTION_PROMPTS]
    lines += [ordinal_question(step) for step in range(len(ORDINALS))]
    lines += [
        "how many objects are there?",
        "which colour is the ground?",
        *NUMBERS,
        *(name for name, _ in GROUNDS),
    ]
    lines += ["what is on the left?", "what is on the right?", "what is above?", "what is below?"]
    lines += ["left", "right", "above", "below"] * 50
    for _, caption in read_scene_objects():
        lines += [f"where is the {caption}?"]
        lines += [f"what is {side} the {caption}?" for side in ("left of", "right of", "above", "below")]
    return lines


class TextRows:
    """Prompt and answer to one padded row: image placeholders, prompt, answer, end; labels on the answer alone."""

    def __init__(self, processor: Processor):
        self.processor = processor
        self._cache: dict[tuple[str, bool], list[int]] = {}
        self._answers: dict[str, list[int]] = {}

    def prompt_ids(self, prompt: str, image: bool) -> list[int]:
        """The inference template with its image token expanded, or left out for a question without image."""
        key = (prompt, image)
        if key not in self._cache:
            self._cache[key] = self.processor.prompt_ids(prompt, int(image))
        return self._cache[key]

    def answer_ids(self, answer: str) -> list[int]:
        if answer not in self._answers:
            self._answers[answer] = [*self.processor.text_ids(answer), self.processor.eos_id]
        return self._answers[answer]

    def rows(self, samples: Sequence[tuple[str, str]], image: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(prompt, answer) pairs -> input_ids, attention_mask, labels, each int64 [B, S], right-padded.

        labels[t] is the token that position t must predict, so prompt, prefix and padding are IGNORED.
        """
        parts = [(self.prompt_ids(prompt, image), self.answer_ids(answer)) for prompt, answer in samples]
        shape = len(parts), max(len(head) + len(tail) - 1 for head, tail in parts)
        ids, mask, labels = (np.full(shape, fill) for fill in (self.processor.pad_id, 0, IGNORED))
        for row, (head, tail) in enumerate(parts):
            start, end = len(head), len(head) + len(tail) - 1
            ids[row, :start], ids[row, start:end] = head, tail[:-1]
            mask[row, :end] = 1
            labels[row, start - 1 : end] = tail
        return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels)

    def embedded(
        self, model: MicroVLM, samples: list[tuple[str, str]], prefixes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embedded rows [B, S, H], mask and labels of prompts with (or, for None, without) one image each."""
        device = model.memory_prior.device
        ids, mask, labels = (part.to(device) for part in self.rows(samples, prefixes is not None))
        if prefixes is None:
            return model.embed(ids), mask, labels
        return model.place_images(ids, self.processor.image_id, prefixes), mask, labels
