"""The decode loop of every backend: numpy arrays over the `Runtime` protocol, without images, files or text.

A batch is padded on the left, and every row gets the answer that it would get alone. Position 0 belongs to the memory
slot; column 0 of every attention mask says whether a row sees it. Text starts at position 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, cast, runtime_checkable

import numpy as np

from microvlm.errors import UserError
from microvlm.runtime import Memories, MemoryArrays, MemoryReading, Past, Runtime
from microvlm.sampling import Chooser as Chooser
from microvlm.sampling import GenerationOptions as GenerationOptions
from microvlm.sampling import log_probability as log_probability
from microvlm.sampling import nucleus as nucleus  # the four are names of this module, too
from microvlm.state_choice import state_for

PHASES = ("vision", "embed", "memory_read", "prefill", "decode")

OnToken = Callable[[int, int], None]
"""Callback (row, token): called for every token of an answer as soon as it is chosen, not for stop tokens."""


class Timings:
    """Milliseconds by phase. The times of a phase that is entered again are added."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = (time.perf_counter() - start) * 1e3
            self.milliseconds[name] = self.milliseconds.get(name, 0.0) + elapsed


class Prompt(NamedTuple):
    """A batch of embedded prompts, ready for the decoder."""

    inputs_embeds: np.ndarray
    """float32 [B, S, H]."""
    attention_mask: np.ndarray
    """int64 [B, S], without the memory slot's column."""


class MemorySlot(NamedTuple):
    """The result of reading the memory for a batch of prompts."""

    slot: Past
    """The cache that the prefill starts from: one KV position per layer."""
    slot_mask: np.ndarray
    """int64 [B], 1 where the row sees the slot."""
    reading: MemoryReading | None
    """None when there was no memory to read."""


@dataclass
class GenerationResult:
    """The answers of a batch."""

    tokens: list[list[int]]
    """Token ids per row, without the stop token."""
    stopped: list[bool]
    """Whether the row ended with a stop token rather than at the limit."""
    timings_ms: dict[str, float]
    memory_slot: MemorySlot
    steps: int = field(default=0)
    """Decoder calls after the prefill."""
    log_probabilities: list[list[float]] = field(default_factory=list)
    """Natural log probability of every chosen token per row, the stop token's last (`log_probability`). Empty where
    another package's `speak` does not tell."""

    def log_probability(self, row: int) -> float | None:
        """The log probability of a row's whole answer, with its stop token; None where it is not told."""
        return sum(self.log_probabilities[row]) if self.log_probabilities else None


@runtime_checkable
class SpeaksItself(Protocol):
    """A runtime that runs the decode loop itself, because its model is on another machine."""

    def speak(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        memory_slot: MemorySlot,
        on_token: OnToken | None,
        timings: Timings,
    ) -> GenerationResult:
        """`speak` of this module, with the runtime's own model; `timings` gets the other machine's times."""
        ...


def place_images(
    embeds: np.ndarray, input_ids: np.ndarray, image_id: int, features: np.ndarray
) -> np.ndarray:
    """Replace the embeddings of the image tokens by image features, in order.

    embeds [B, S, H], input_ids [B, S], features [images, k, H] -> [B, S, H]. Raises ValueError if their numbers differ.
    """
    is_image = input_ids == image_id
    rows = features.reshape(-1, features.shape[-1])
    if int(is_image.sum()) != len(rows):
        raise ValueError(f"{int(is_image.sum())} image tokens for {len(rows)} prefix embeddings")
    result = embeds.copy()
    result[is_image] = rows
    return result


def embed_prompt(
    runtime: Runtime,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    pixel_values: np.ndarray | None,
    image_id: int,
    timings: Timings | None = None,
) -> Prompt:
    """Embed token ids [B, S] and the images [images, 3, side, side] among them: phases `vision` and `embed`.

    Raises UserError for a prompt that is longer than the model's positions, before any of it is embedded.
    """
    timings = timings or Timings()
    _check_positions(runtime, int(attention_mask.sum(1).max()), 0)
    features = None
    if pixel_values is not None:
        with timings.phase("vision"):
            features = runtime.encode_image(pixel_values)
    with timings.phase("embed"):
        embeds = runtime.embed_tokens(input_ids)
        if features is not None:
            embeds = place_images(embeds, input_ids, image_id, features)
    return Prompt(embeds, attention_mask)


def read_slot(
    runtime: Runtime, prompt: Prompt, memory: Memories | None, timings: Timings | None = None
) -> MemorySlot:
    """Read the memory with each prompt as the query: phase `memory_read`. Rows that are out of scope mask their slot.

    `memory` is one state for all rows (batch 1) or one state per row. From a list of states (batch 1 each) every row
    reads the state that knows its key best.
    """
    batch = len(prompt.inputs_embeds)
    if memory is None:
        return MemorySlot(runtime.empty_slot(batch), np.zeros(batch, np.int64), None)
    with (timings or Timings()).phase("memory_read"):
        latent, key = runtime.memory_encode(prompt.inputs_embeds, prompt.attention_mask)
        reading = runtime.memory_read(key, latent, _state_for_rows(key, memory))
    in_scope = reading.scope >= runtime.config.memory.scope_threshold
    return MemorySlot(reading.slot, in_scope.astype(np.int64), reading)


def prefill(
    runtime: Runtime, prompt: Prompt, memory_slot: MemorySlot, num_logits: int = 1
) -> tuple[np.ndarray, Past]:
    """Run the decoder over whole prompts -> (logits of the last positions [B, num_logits, V], cache)."""
    mask = np.concatenate([memory_slot.slot_mask[:, None], prompt.attention_mask], 1)
    positions = positions_of(prompt.attention_mask)
    return runtime.decode(prompt.inputs_embeds, mask, positions, memory_slot.slot, num_logits)


def positions_of(attention_mask: np.ndarray) -> np.ndarray:
    """Attention mask int64 [B, S] -> position ids [B, S]. Text starts at 1; position 0 is the memory slot."""
    return np.maximum(attention_mask.cumsum(1), 1)


def repeat_memory(memory: MemoryArrays, batch: int) -> MemoryArrays:
    """Repeat one state (batch 1) for every row. Raises UserError for another number of states than rows."""
    if len(memory.mean) == batch:
        return memory
    if len(memory.mean) != 1:
        raise UserError(
            f"the memory holds {len(memory.mean)} states for {batch} prompts; give one, or one a prompt."
        )
    return MemoryArrays(*(np.repeat(part, batch, 0) for part in memory))


def _state_for_rows(key: np.ndarray, memory: Memories) -> MemoryArrays:
    if isinstance(memory, MemoryArrays):
        return repeat_memory(memory, len(key))
    return repeat_memory(memory[0], len(key)) if len(memory) == 1 else state_for(key, memory)


def generate(
    runtime: Runtime,
    prompt: Prompt,
    options: GenerationOptions,
    memory: Memories | None = None,
    on_token: OnToken | None = None,
    timings: Timings | None = None,
) -> GenerationResult:
    """Answer a batch of prompts. Raises UserError when prompt and answer do not fit the model's positions."""
    timings = timings or Timings()
    check_length(runtime, prompt, options)
    memory_slot = read_slot(runtime, prompt, memory, timings)
    return speak_where_it_runs(runtime, prompt, options, memory_slot, on_token, timings)


def speak_where_it_runs(
    runtime: Runtime,
    prompt: Prompt,
    options: GenerationOptions,
    memory_slot: MemorySlot,
    on_token: OnToken | None,
    timings: Timings,
) -> GenerationResult:
    """`speak`, on the other machine where the model is on one."""
    # The type decides, so that a wrapper which forwards attributes and records calls still sees every call.
    if issubclass(type(runtime), SpeaksItself):
        return cast(SpeaksItself, runtime).speak(prompt, options, memory_slot, on_token, timings)
    return speak(runtime, prompt, options, memory_slot, on_token, timings)


def speak(
    runtime: Runtime,
    prompt: Prompt,
    options: GenerationOptions,
    memory_slot: MemorySlot,
    on_token: OnToken | None,
    timings: Timings,
) -> GenerationResult:
    """Generate answers after the memory was read: phases `prefill` and `decode`."""
    with timings.phase("prefill"):
        logits, past = prefill(runtime, prompt, memory_slot)
    batch = len(prompt.inputs_embeds)
    mask = np.concatenate([memory_slot.slot_mask[:, None], prompt.attention_mask], 1)
    position = positions_of(prompt.attention_mask)[:, -1:]
    choosers = [Chooser(options) for _ in range(batch)]
    result = GenerationResult([[] for _ in range(batch)], [False] * batch, timings.milliseconds, memory_slot)
    result.log_probabilities = [[] for _ in range(batch)]
    with timings.phase("decode"):
        while True:
            chosen = [
                choose(row) if not stopped else 0
                for choose, row, stopped in zip(choosers, logits[:, -1], result.stopped, strict=True)
            ]
            for row, token in enumerate(chosen):
                if not result.stopped[row]:
                    result.log_probabilities[row].append(log_probability(logits[row, -1], token))
            _append(result, chosen, options.stop_tokens or (), on_token)
            if all(result.stopped) or result.steps + 1 == options.max_new_tokens:
                return result
            # Finished rows continue with token 0 until the last row ends; their output is discarded.
            mask = np.concatenate([mask, np.ones((batch, 1), np.int64)], 1)
            position = position + 1
            embeds = runtime.embed_tokens(np.asarray(chosen, np.int64)[:, None])
            logits, past = runtime.decode(embeds, mask, position, past)
            result.steps += 1


def teacher_force(
    runtime: Runtime,
    prompt: Prompt,
    answers: np.ndarray,
    memory_slot: MemorySlot,
    timings: Timings | None = None,
) -> np.ndarray:
    """Logits [B, n, V] of known answers, int64 [B, n]: each token's prediction given those before it, in one call."""
    timings = timings or Timings()
    with timings.phase("embed"):
        embeds = runtime.embed_tokens(answers[:, :-1]) if answers.shape[1] > 1 else None
    if embeds is not None:
        prompt = Prompt(
            np.concatenate([prompt.inputs_embeds, embeds], 1),
            np.concatenate([prompt.attention_mask, np.ones(embeds.shape[:2], np.int64)], 1),
        )
    with timings.phase("prefill"):
        return prefill(runtime, prompt, memory_slot, answers.shape[1])[0]


def check_length(runtime: Runtime, prompt: Prompt, options: GenerationOptions) -> None:
    """Raise UserError unless the longest prompt and its answer fit the model's positions."""
    _check_positions(runtime, int(prompt.attention_mask.sum(1).max()), options.max_new_tokens)


def _check_positions(runtime: Runtime, length: int, new_tokens: int) -> None:
    limit = runtime.config.text.max_position_embeddings - 1  # one position is the memory slot's
    if length + new_tokens <= limit:
        return
    if length > limit:
        raise UserError(f"the prompt is {length} tokens, more than the {limit} of this model; shorten it.")
    raise UserError(
        f"the prompt is {length} tokens and the answer may be {new_tokens}, more than the {limit} of this model; "
        "shorten the prompt or give a smaller --max-new-tokens."
    )


def _append(
    result: GenerationResult, chosen: list[int], stop_tokens: Sequence[int], on_token: OnToken | None
) -> None:
    for row, token in enumerate(chosen):
        if result.stopped[row]:
            continue
        if token in stop_tokens:
            result.stopped[row] = True
            continue
        result.tokens[row].append(token)
        if on_token is not None:
            on_token(row, token)
