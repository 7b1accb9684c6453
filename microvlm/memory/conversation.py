"""A conversation with one model over its episodic memory. Knows no terminal and no backend.

A new picture is written under the question of its place ("what was in the first image?"), which is how it can be
asked for when it is gone; any other turn is written under its own question (and picture). The value is the whole turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from microvlm.generation import GenerationOptions, Prompt, Timings, embed_prompt, generate
from microvlm.inputs.images import ImageSource
from microvlm.inputs.processor import Processor
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.memory_file import load_memory, save_memory
from microvlm.memory.ordinal_questions import ORDINALS, ordinal_question
from microvlm.memory.query import Asked
from microvlm.runtime import Runtime

if TYPE_CHECKING:
    from microvlm.backends.base import LoadedRuntime


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str
    tokens: list[int]
    timings_ms: dict[str, float]
    recalled: bool
    """Whether the memory was in scope and seen."""
    scope: float
    """Probability that the memory answers the question."""
    stored: bool
    """Whether the turn was written into the memory."""


class Chat:
    """Asks, answers, and remembers. `memory` may be replaced or saved between turns."""

    def __init__(
        self,
        runtime: LoadedRuntime,
        processor: Processor,
        options: GenerationOptions | None = None,
        memory: EpisodicMemory | None = None,
    ):
        """`options` without stop tokens gets the processor's."""
        self.runtime, self.processor = runtime, processor
        options = options or GenerationOptions(max_new_tokens=processor.max_new_tokens)
        self.options = dataclasses.replace(options, stop_tokens=options.stop_tokens or processor.stop_tokens)
        self.memory = memory or EpisodicMemory.empty(runtime)

    def ask(
        self,
        question: str,
        image: ImageSource | None = None,
        new_image: bool = False,
        on_text: Callable[[str], None] | None = None,
        label: str = "",
    ) -> Turn:
        """Answer `question` about `image`, or about nothing but the memory, then write the turn.

        `new_image`: the picture was not shown before. `label` names it in the log. An answer that came out of the
        memory alone is not written back. Raises UserError, and then nothing was written.
        """
        timings = Timings()
        with timings.phase("preprocess"):
            asked = Asked.about(self.processor, question, image)
            inputs = asked.inputs(self.processor)
        prompt = embed_prompt(self.runtime, *inputs, self.processor.image_id, timings)
        stream = self.processor.stream()

        def show(_: int, token: int) -> None:
            if on_text is not None:
                on_text(stream.feed(token))

        made = generate(self.runtime, prompt, self.options, self.memory.states, show, timings)
        if on_text is not None:
            on_text(stream.finish())
        tokens, reading = made.tokens[0], made.recall.reading
        answer = self.processor.decode(tokens)
        recalled = bool(made.recall.slot_mask[0])
        stored = image is not None or not recalled
        if stored:
            with timings.phase("memory_write"):
                told = f"{label}: {question} {answer}" if label else f"{question} {answer}"
                self._write(prompt, asked, told, tokens, image is not None and new_image)
        scope = float(reading.scope[0]) if reading is not None else 0.0
        return Turn(question, answer, tokens, timings.milliseconds, recalled, scope, stored)

    def reset(self) -> None:
        """Back to the empty memory."""
        self.memory = EpisodicMemory.empty(self.runtime)

    def save(self, path: str | Path) -> None:
        """See `save_memory`."""
        save_memory(self.memory, path, self.runtime.fingerprint)

    def load(self, path: str | Path) -> None:
        """See `load_memory`."""
        self.memory = load_memory(path, self.runtime.fingerprint)

    def _write(self, prompt: Prompt, asked: Asked, told: str, tokens: list[int], new_image: bool) -> None:
        """`told` is what the log shows of the turn."""
        place = sum(entry.image for entry in self.memory.entries)
        by_place = new_image and place < len(ORDINALS)
        under = Asked(ordinal_question(place)) if by_place else asked
        cue = text_prompt(self.runtime, self.processor, under.question) if by_place else prompt
        _, key = self.runtime.memory_encode(*cue)
        code, _ = self.runtime.memory_encode(*with_answer(self.runtime, prompt, tokens))
        entry = Entry(told, key[0], code[0], image=by_place, question=under.question, picture=under.picture)
        self.memory.write(self.runtime, entry)


def text_prompt(runtime: Runtime, processor: Processor, question: str) -> Prompt:
    """A question without a picture, as the decoder and the memory encoder read it."""
    return embed_prompt(runtime, *processor([question]), processor.image_id)


def with_answer(runtime: Runtime, prompt: Prompt, tokens: list[int]) -> Prompt:
    """A whole turn, batch 1: the prompt and its answer, whose code is the value that a memory keeps."""
    if not tokens:
        return prompt
    embeds = runtime.embed_tokens(np.asarray([tokens], np.int64))
    mask = np.ones((1, len(tokens)), np.int64)
    return Prompt(
        np.concatenate([prompt.inputs_embeds, embeds], 1), np.concatenate([prompt.attention_mask, mask], 1)
    )
