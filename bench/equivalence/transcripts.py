"""Runs one model on samples: greedy answers with their logits, teacher forcing, and the long episode.

Everything goes through `microvlm.generation`, the loop that users run. numpy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from microvlm.bench.equivalence.samples import EpisodeScript
from microvlm.generation import GenerationOptions, Prompt, embed_prompt, generate, read_slot, teacher_force
from microvlm.inputs.processor import Processor
from microvlm.runtime import ArrayValue, MemoryArrays, Past, Runtime


@dataclass
class Answer:
    """A model's answer to one prompt."""

    choices: list[int]
    """Every greedy choice, a stop token included."""
    logits: np.ndarray
    """float32 [n, V], one row a choice."""
    text: str


@dataclass
class EpisodeTrace:
    """Every state and reading of one episode, in order."""

    states: list[MemoryArrays] = field(default_factory=list)
    """Memory state after each write."""
    forgotten: list[MemoryArrays] = field(default_factory=list)
    """Memory state after each forget."""
    latents: list[np.ndarray] = field(default_factory=list)
    """z of each image [1, C]."""
    readings: list[np.ndarray] = field(default_factory=list)
    """z_r of each question [1, C]."""
    scopes: list[float] = field(default_factory=list)
    slots: list[list[np.ndarray]] = field(default_factory=list)
    """Key and value of each layer, per question."""
    answers: list[Answer] = field(default_factory=list)


class LogitsListener:
    """A runtime that passes every call on and keeps the last row of each call's logits.

    With `follow`, the decode loop sees logits that choose these tokens instead, so that a replayed run makes the calls
    of the recorded one whatever its own choices are.
    """

    def __init__(self, runtime: Runtime, follow: Sequence[int] | None = None):
        self._runtime = runtime
        self._follow = follow
        self.rows: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def decode(self, *arguments: Any, **options: Any) -> tuple[np.ndarray, Past]:
        logits, past = self._runtime.decode(*arguments, **options)
        self.rows.append(logits[0, -1].copy())
        if self._follow is not None:
            logits = np.zeros_like(logits)
            logits[0, -1, self._follow[len(self.rows) - 1]] = 1
        return logits, past


def make_prompt(runtime: Runtime, processor: Processor, text: str, images: Iterable[Any]) -> Prompt:
    return embed_prompt(runtime, *processor([text], [list(images)]), processor.image_id)


def answer(
    runtime: Runtime,
    processor: Processor,
    prompt: Prompt,
    limit: int,
    memory: MemoryArrays | None = None,
    follow: Sequence[int] | None = None,
) -> Answer:
    """Greedy, at most `limit` tokens; along the tokens of `follow` where given."""
    listener = LogitsListener(runtime, follow)
    options = GenerationOptions(max_new_tokens=limit, stop_tokens=processor.stop_tokens)
    generate(listener, prompt, options, memory)  # type: ignore[arg-type]
    choices = [int(row.argmax()) for row in listener.rows]
    tokens = [token for token in choices if token not in processor.stop_tokens]
    return Answer(choices, np.stack(listener.rows), processor.decode(tokens).strip())


def forced_logits(
    runtime: Runtime, prompt: Prompt, choices: list[int], memory: MemoryArrays | None = None
) -> np.ndarray:
    """Logits [n, V] that predict each of `choices` given those before it, in one call."""
    memory_slot = read_slot(runtime, prompt, memory)
    return teacher_force(runtime, prompt, np.asarray(choices, np.int64)[None], memory_slot)[0]


def play(
    runtime: Runtime,
    processor: Processor,
    script: EpisodeScript,
    limit: int,
    follow: Sequence[Answer] | None = None,
    forgets: int = 5,
) -> EpisodeTrace:
    """Write every image under its question, ask every question, forget the first `forgets` rows again.

    `follow`: the answers of a recorded run, to be repeated.
    """
    trace = EpisodeTrace()
    state, rows = runtime.memory_prior(), []
    for image, caption, question in zip(script.images, script.captions, script.questions, strict=True):
        ids = processor.prompt_ids(script.caption_prompt, 1) + processor.text_ids(caption)
        input_ids = np.asarray([ids], np.int64)
        fact = embed_prompt(
            runtime, input_ids, np.ones_like(input_ids), processor.pixels(image)[None], processor.image_id
        )
        prompt = make_prompt(runtime, processor, question, [])
        latent, _ = runtime.memory_encode(fact.inputs_embeds, fact.attention_mask)
        _, key = runtime.memory_encode(prompt.inputs_embeds, prompt.attention_mask)
        state = runtime.memory_write(key, latent, state)
        rows.append((key, latent))
        trace.latents.append(latent)
        trace.states.append(state)
    for index, question in enumerate(script.questions):
        tokens = None if follow is None else follow[index].choices
        _ask(runtime, processor, question, limit, state, trace, tokens)
    for key, latent in rows[:forgets]:
        state = runtime.memory_forget(key, latent, state)
        trace.forgotten.append(state)
    return trace


def _ask(
    runtime: Runtime,
    processor: Processor,
    question: str,
    limit: int,
    state: MemoryArrays,
    trace: EpisodeTrace,
    follow: Sequence[int] | None,
) -> None:
    prompt = make_prompt(runtime, processor, question, [])
    reading = read_slot(runtime, prompt, state).reading
    assert reading is not None
    trace.readings.append(reading.latent)
    trace.scopes.append(float(reading.scope[0]))
    trace.slots.append(slot_arrays(reading.slot))
    trace.answers.append(answer(runtime, processor, prompt, limit, state, follow))


def slot_arrays(past: Past) -> list[np.ndarray]:
    """A cache, see `Past`, -> its arrays, flat, layer by layer."""
    if isinstance(past, list | tuple):
        return [array for part in past for array in slot_arrays(part)]
    if isinstance(past, dict):
        return [array for part in past.values() for array in slot_arrays(part)]
    return [past.numpy() if isinstance(past, ArrayValue) else np.asarray(past)]
