"""A conversation with a model over its episodic memory. Knows no terminal and no backend.

A new image is written under the question of its place ("what was in the first image?"), which finds it again when it is
gone from view. Any other turn is written under its own question and image. The value is the whole turn with its answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from microvlm.answers.answering import check_min_confidence, judge
from microvlm.errors import UserError
from microvlm.generation import GenerationOptions, Prompt, Timings, embed_prompt, generate
from microvlm.inputs.images import ImageSource
from microvlm.inputs.processor import Processor
from microvlm.loaded_model import complete_options, runtime_and_processor
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.memory_file import open_memory, store_memory
from microvlm.memory.ordinal_questions import ORDINALS, ordinal_question
from microvlm.memory.query import Query
from microvlm.runtime import Runtime

if TYPE_CHECKING:
    from microvlm.loaded_model import ModelSource


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str
    tokens: list[int]
    """Token ids of the answer."""
    timings_ms: dict[str, float]
    """Milliseconds by phase."""
    from_memory: bool
    """Whether the memory was in scope, so that the answer could come from it."""
    scope: float
    """Probability that the memory answers the question."""
    stored: bool
    """Whether the turn was written into the memory."""
    declined: bool = False
    """Whether the model was not sure enough of its own words, or these decline."""
    answer_confidence: float | None = None
    """Calibrated probability that the model's own words are right; None as in `Answer`."""


class Chat:
    """A conversation that remembers its images and answers. `memory` may be replaced or saved between turns."""

    def __init__(
        self,
        model: ModelSource,
        processor: Processor | None = None,
        options: GenerationOptions | None = None,
        memory: EpisodicMemory | None = None,
        min_confidence: float | None = None,
    ):
        """`model` is what `microvlm.load` or `MicroVLM.from_pretrained` returned, or a runtime with its `processor`.

        Stop tokens of None in `options` are the processor's. `min_confidence` takes the place of the model's threshold,
        below which an answer is declined. Raises UserError for anything else.
        """
        self.runtime, self.processor = runtime_and_processor(model, processor)
        check_min_confidence(self.runtime.config.answers, min_confidence)
        self.min_confidence = min_confidence
        self.options = complete_options(self.processor, options)
        self.memory = memory or EpisodicMemory.empty(self.runtime)
        self.memory.write_pending(self.runtime)
        self._shown_pictures = _pictures(self.memory)

    def ask(
        self,
        question: str,
        image: ImageSource | None = None,
        new_image: bool | None = None,
        on_text: Callable[[str], None] | None = None,
        label: str = "",
    ) -> Turn:
        """Answer `question` about `image`, or from the memory alone, then write the turn into the memory.

        `new_image` says whether the image takes the next place of the conversation; None: if it was not shown before.
        `on_text` gets the answer piece by piece. `label` names the image in the log. An answer that came from the
        memory alone is not written again. Raises UserError, and then nothing was written.
        """
        if not question.strip():
            raise UserError("the question is empty: ask something.")
        timings = Timings()
        with timings.phase("preprocess"):
            query = Query.build(self.processor, question, image)
            inputs = query.inputs(self.processor)
        prompt = embed_prompt(self.runtime, *inputs, self.processor.image_id, timings)
        stream = self.processor.stream()

        # Whether an answer is declined is known at its end: a calibrated model's is told whole.
        is_whole = self.runtime.config.answers is not None

        def show(_: int, token: int) -> None:
            if on_text is not None and not is_whole:
                on_text(stream.feed(token))

        result = generate(self.runtime, prompt, self.options, self.memory.states, show, timings)
        (judged,) = judge(self.runtime.config.answers, self.processor, result, self.min_confidence)
        if on_text is not None:
            on_text(judged.text if is_whole else stream.finish())
        answer, from_memory, reading = judged.text, judged.from_memory, result.memory_slot.reading
        # What was said is remembered, and not what was declined.
        tokens = judged.tokens if answer == judged.own_text else self.processor.text_ids(answer)
        stored = image is not None or not from_memory
        if stored:
            with timings.phase("memory_write"):
                log_text = f"{label}: {question} {answer}" if label else f"{question} {answer}"
                self._write(prompt, query, log_text, tokens, self._is_new(query, new_image))
        scope = float(reading.scope[0]) if reading is not None else 0.0
        return Turn(
            *(question, answer, tokens, timings.milliseconds, from_memory, scope, stored),
            declined=judged.declined,
            answer_confidence=judged.confidence,
        )

    def reset(self) -> None:
        """Empty the memory and forget which images were shown."""
        self.memory = EpisodicMemory.empty(self.runtime)
        self._shown_pictures = set()

    def save(self, path: str | Path) -> None:
        """Bring a file up to date. See `store_memory`."""
        store_memory(self.memory, path, self.runtime.fingerprint)

    def load(self, path: str | Path) -> None:
        """Replace the memory by a file's. See `open_memory`."""
        self.memory = open_memory(path, self.runtime)
        self._shown_pictures = _pictures(self.memory)

    def _is_new(self, query: Query, new_image: bool | None) -> bool:
        if query.pixels is None:
            return False
        is_new = query.picture not in self._shown_pictures if new_image is None else new_image
        self._shown_pictures.add(query.picture)
        return is_new

    def _write(self, prompt: Prompt, query: Query, log_text: str, tokens: list[int], new_image: bool) -> None:
        place = self.memory.image_count
        by_place = new_image and place < len(ORDINALS)
        cue, cue_prompt = query, prompt
        if by_place:
            cue = Query(ordinal_question(place))
            cue_prompt = text_prompt(self.runtime, self.processor, cue.question)
        _, key = self.runtime.memory_encode(*cue_prompt)
        latent, _ = self.runtime.memory_encode(*with_answer(self.runtime, prompt, tokens))
        # Copies: a row of a batch of one would keep the batch's array alive beside itself.
        key, latent = np.array(key[0]), np.array(latent[0])
        entry = Entry(log_text, key, latent, image=by_place, question=cue.question, picture=cue.picture)
        self.memory.write(self.runtime, entry)


def text_prompt(runtime: Runtime, processor: Processor, question: str) -> Prompt:
    """Embed a question without an image, batch 1, for the decoder or the memory encoder."""
    return embed_prompt(runtime, *processor([question]), processor.image_id)


def with_answer(runtime: Runtime, prompt: Prompt, tokens: list[int]) -> Prompt:
    """Append an answer to a prompt of batch 1: the whole turn, whose latent is the value that a memory keeps."""
    if not tokens:
        return prompt
    embeds = runtime.embed_tokens(np.asarray([tokens], np.int64))
    mask = np.ones((1, len(tokens)), np.int64)
    return Prompt(
        np.concatenate([prompt.inputs_embeds, embeds], 1), np.concatenate([prompt.attention_mask, mask], 1)
    )


def _pictures(memory: EpisodicMemory) -> set[str]:
    return {entry.picture for entry in memory.entries if entry.picture}
