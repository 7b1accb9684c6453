"""A conversation with a model over its episodic memory. Knows no terminal and no backend.

The caption of a new image is written under the question of its place ("what was in the first image?"), which finds it
again when it is gone from view. Any other turn about an image is written under its own question and image. The value is
the whole turn with its answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from microvlm.answers.answering import Answer, check_min_confidence, judge
from microvlm.errors import UserError
from microvlm.generation import (
    GenerationOptions,
    OnToken,
    Prompt,
    Timings,
    check_length,
    embed_prompt,
    generate,
)
from microvlm.inputs.images import ImageSource
from microvlm.inputs.processor import Processor
from microvlm.loaded_model import complete_options, runtime_and_processor
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.memory_file import open_memory, store_memory
from microvlm.memory.ordinal_questions import ORDINALS, ordinal_question
from microvlm.memory.pointing.encoded_query import encode_query, same_picture, text_prompt
from microvlm.memory.pointing.pointer import NOT_FOUND, find_entry
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
    """Whether the answer is the text of an entry."""
    scope: float
    """Probability of the scope detector that the memory answers the question."""
    stored: bool
    """Whether the turn was written into the memory."""
    declined: bool = False
    """Whether the model was not sure enough of its own words, or these decline."""
    answer_confidence: float | None = None
    """Calibrated probability that the model's own words are right; None as in `Answer`."""
    confidence: float = 0.0
    """Probability that the entry which the reading points at answers the question."""
    entry: int | None = None
    """Index of the entry whose text is the answer; None for the decoder's answers and `NOT_FOUND`."""


class Said(NamedTuple):
    """One turn as it goes into the log."""

    question: str
    """As it was typed."""
    answer: str
    tokens: list[int]
    label: str
    """Name of the image; empty without one."""
    adds_nothing: bool = False
    """Whether the answer is a fact's, which is in the memory already, or declines."""


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
        on_token: OnToken | None = None,
    ) -> Turn:
        """Answer `question` about `image`, or from the memory alone, then write the turn into the memory.

        A fact that was told answers first, by its own text; then the decoder looks at the image. Without an image the
        answer is an entry's text or `NOT_FOUND`. What the memory said is not written again, and what the model declined
        is not written. `new_image` says whether the image takes the next place of the conversation, under which its
        caption is written; None: if it was not shown before. `on_text` gets the answer piece by piece, and whole
        where it may be declined at its end; `on_token` gets the model's own tokens before that is known. `label` names
        the image in the log. Raises UserError, and then nothing was written.
        """
        if not question.strip():
            raise UserError("the question is empty: ask something.")
        timings = Timings()
        with timings.phase("preprocess"):
            query = Query.build(self.processor, question, image)
            inputs = query.inputs(self.processor)
        prompt = embed_prompt(self.runtime, *inputs, self.processor.image_id, timings)
        check_length(self.runtime, prompt, self.options)
        with timings.phase("memory_read"):
            encoded = encode_query(self.runtime, self.processor, query, prompt, to_read=True)
            pointing = find_entry(self.runtime, self.memory, encoded)
        entry = None if pointing.entry is None else self.memory.entries[pointing.entry]
        if image is not None and entry is not None and not entry.told:
            entry = None  # what the model said of an image before adds nothing to the image
        judged = None
        if entry is None and image is not None:
            judged, tokens = self._generate(prompt, timings, on_text, on_token)
            answer = judged.text
        else:
            answer = NOT_FOUND if entry is None else entry.value
            tokens = self.processor.text_ids(answer)
            if on_text is not None:
                on_text(answer)
        is_new = image is not None and self._is_new(query, new_image)
        is_declined = judged is not None and judged.declined
        # What the model could not say is nothing to remember; a new image takes its place all the same.
        stored = image is not None and (is_new or (entry is None and not is_declined))
        if stored:
            with timings.phase("memory_write"):
                adds_nothing = entry is not None or is_declined
                said = Said(question, answer, tokens, label, adds_nothing)
                self._write_turn(query, prompt, said, is_new, timings)
        index = None if entry is None else pointing.entry
        scope = float(pointing.reading.scope[0])
        return Turn(
            *(question, answer, tokens, timings.milliseconds, entry is not None, scope, stored),
            declined=is_declined,
            answer_confidence=None if judged is None else judged.confidence,
            confidence=pointing.confidence,
            entry=index,
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

    def _generate(
        self,
        prompt: Prompt,
        timings: Timings,
        on_text: Callable[[str], None] | None = None,
        on_token: OnToken | None = None,
    ) -> tuple[Answer, list[int]]:
        """The decoder's answer, without a memory, and the tokens of what is said, which may decline."""
        stream = self.processor.stream()
        # Whether an answer is declined is known at its end: a calibrated model's is told whole.
        is_whole = self.runtime.config.answers is not None

        def show(row: int, token: int) -> None:
            if on_token is not None:
                on_token(row, token)
            if on_text is not None and not is_whole:
                on_text(stream.feed(token))

        result = generate(self.runtime, prompt, self.options, None, show, timings)
        (judged,) = judge(self.runtime.config.answers, self.processor, result, self.min_confidence)
        if on_text is not None:
            on_text(judged.text if is_whole else stream.finish())
        # What was said is remembered, and not what was declined.
        is_own = judged.text == judged.own_text
        return judged, judged.tokens if is_own else self.processor.text_ids(judged.text)

    def _is_new(self, query: Query, new_image: bool | None) -> bool:
        is_new = query.picture not in self._shown_pictures if new_image is None else new_image
        self._shown_pictures.add(query.picture)
        return is_new

    def _write_turn(self, query: Query, prompt: Prompt, said: Said, is_new: bool, timings: Timings) -> None:
        """Write a turn about an image, unless it adds nothing; of a new image its caption too, under its place."""
        place = self.memory.image_count
        if not is_new or place >= len(ORDINALS):
            if not said.adds_nothing:
                self._write(query, prompt, prompt, said)
            return
        cue = Query(ordinal_question(place))
        cue_prompt = text_prompt(self.runtime, self.processor, cue.question)
        caption_query = query.captioned(self.processor)
        if caption_query.question == query.question:
            self._write(cue, cue_prompt, prompt, said, image=True)
            return
        shown = same_picture(self.runtime, self.processor, query, prompt, caption_query)
        check_length(self.runtime, shown, self.options)
        caption, tokens = self._generate(shown, timings)
        captioned = Said(self.processor.config.prompt.caption_prompt, caption.text, tokens, said.label)
        self._write(cue, cue_prompt, shown, captioned, image=True)
        if not said.adds_nothing:
            self._write(query, prompt, prompt, said)

    def _write(self, cue: Query, cue_prompt: Prompt, turn: Prompt, said: Said, image: bool = False) -> None:
        """Write what was said after `turn` under the key of `cue`."""
        encoded = encode_query(self.runtime, self.processor, cue, cue_prompt)
        latent, _ = self.runtime.memory_encode(*with_answer(self.runtime, turn, said.tokens))
        text = f"{said.question} {said.answer}"
        text = f"{said.label}: {text}" if said.label else text
        entry = Entry(
            text,
            latent=np.array(latent[0]),
            image=image,
            question=cue.question,
            picture=cue.picture,
            value_start=len(text) - len(said.answer),
            told=False,
            **encoded.entry_arrays(),
        )
        self.memory.write(self.runtime, entry)


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
