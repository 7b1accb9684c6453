"""THE decode loop: numpy over the `Runtime` protocol, for every backend. Knows no images, files or text.

A batch is padded on the left and gives each row what it would get alone. Position 0 is the memory slot's,
column 0 of every attention mask says whether the row sees it, and text starts at position 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from microvlm.errors import UserError
from microvlm.runtime import Memories, MemoryArrays, MemoryReading, Past, Runtime
from microvlm.state_choice import state_for

PHASES = ("vision", "embed", "memory_read", "prefill", "decode")

OnToken = Callable[[int, int], None]
"""(row, token): called once for every token of an answer, stop tokens excluded, as soon as it is chosen."""


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are chosen. Raises UserError, spelled as the flag."""

    max_new_tokens: int = 32
    temperature: float = 0.0
    """0 is greedy; otherwise the logits are divided by it and sampled."""
    top_p: float = 1.0
    """Sample among the most probable tokens that together have at least this probability."""
    seed: int = 0
    """Every row draws from a generator of its own with this seed, so that a batch changes nothing."""
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {self.max_new_tokens}; give 1 or more.")
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature is {self.temperature:g}; give 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p:g}; give more than 0 and at most 1.")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}; give 0 or more.")


class Timings:
    """Milliseconds by phase; a phase entered twice adds up."""

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
    """A batch ready for the decoder."""

    inputs_embeds: np.ndarray
    """float32 [B, S, H]."""
    attention_mask: np.ndarray
    """int64 [B, S], without the slot's column."""


class Recall(NamedTuple):
    """What a prompt finds in the memory."""

    slot: Past
    slot_mask: np.ndarray
    """int64 [B], 1 where the row sees the slot."""
    reading: MemoryReading | None
    """None without a memory."""


@dataclass
class Generated:
    """Answers of a batch."""

    tokens: list[list[int]]
    """Per row, without the stop token."""
    stopped: list[bool]
    """Whether the row ended by a stop token, not by the limit."""
    timings_ms: dict[str, float]
    recall: Recall
    steps: int = field(default=0)
    """Decoder calls after the prefill."""


def place_images(
    embeds: np.ndarray, input_ids: np.ndarray, image_id: int, features: np.ndarray
) -> np.ndarray:
    """[B, S, H] with the rows of `image_id` replaced, in order, by `features` [images, k, H]."""
    where = input_ids == image_id
    rows = features.reshape(-1, features.shape[-1])
    if int(where.sum()) != len(rows):
        raise ValueError(f"{int(where.sum())} image tokens for {len(rows)} prefix embeddings")
    placed = embeds.copy()
    placed[where] = rows
    return placed


def embed_prompt(
    runtime: Runtime,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    pixel_values: np.ndarray | None,
    image_id: int,
    timings: Timings | None = None,
) -> Prompt:
    """Phases `vision` and `embed`."""
    timings = timings or Timings()
    features = None
    if pixel_values is not None:
        with timings.phase("vision"):
            features = runtime.encode_image(pixel_values)
    with timings.phase("embed"):
        embeds = runtime.embed_tokens(input_ids)
        if features is not None:
            embeds = place_images(embeds, input_ids, image_id, features)
    return Prompt(embeds, attention_mask)


def recall(
    runtime: Runtime, prompt: Prompt, memory: Memories | None, timings: Timings | None = None
) -> Recall:
    """Phase `memory_read`: the prompt is the query. Out of scope, a row's slot is masked.

    `memory` is one state for all rows (batch 1) or one a row; of a list of states, batch 1 each, every row reads the
    one that knows its key best.
    """
    batch = len(prompt.inputs_embeds)
    if memory is None:
        return Recall(runtime.empty_slot(batch), np.zeros(batch, np.int64), None)
    with (timings or Timings()).phase("memory_read"):
        latent, key = runtime.memory_encode(prompt.inputs_embeds, prompt.attention_mask)
        reading = runtime.memory_read(key, latent, _state_of(key, memory))
    seen = reading.scope >= runtime.config.memory.scope_threshold
    return Recall(reading.slot, seen.astype(np.int64), reading)


def prefill(
    runtime: Runtime, prompt: Prompt, recalled: Recall, num_logits: int = 1
) -> tuple[np.ndarray, Past]:
    """(logits [B, num_logits, V], cache): the whole prompt at once."""
    mask = np.concatenate([recalled.slot_mask[:, None], prompt.attention_mask], 1)
    positions = positions_of(prompt.attention_mask)
    return runtime.decode(prompt.inputs_embeds, mask, positions, recalled.slot, num_logits)


def positions_of(attention_mask: np.ndarray) -> np.ndarray:
    """int64 [B, S] -> position ids [B, S]: text starts at 1, because position 0 is the memory slot's."""
    return np.maximum(attention_mask.cumsum(1), 1)


def repeat_memory(memory: MemoryArrays, batch: int) -> MemoryArrays:
    """One state for all rows -> one a row."""
    if len(memory.mean) == batch:
        return memory
    if len(memory.mean) != 1:
        raise UserError(
            f"the memory holds {len(memory.mean)} states for {batch} prompts; give one, or one a prompt."
        )
    return MemoryArrays(*(np.repeat(part, batch, 0) for part in memory))


def _state_of(key: np.ndarray, memory: Memories) -> MemoryArrays:
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
) -> Generated:
    """Answers for a batch. Raises UserError when prompt and answer outgrow the model's positions."""
    timings = timings or Timings()
    check_length(runtime, prompt, options)
    recalled = recall(runtime, prompt, memory, timings)
    # A model on another machine speaks there. The type is asked: a listener that passes calls on wants to hear them.
    there = getattr(type(runtime), "speak", None)
    if there is not None:
        return there(runtime, prompt, options, recalled, on_token, timings)
    return speak(runtime, prompt, options, recalled, on_token, timings)


def speak(
    runtime: Runtime,
    prompt: Prompt,
    options: GenerationOptions,
    recalled: Recall,
    on_token: OnToken | None,
    timings: Timings,
) -> Generated:
    """`generate` from what the memory gave on: phases `prefill` and `decode`."""
    with timings.phase("prefill"):
        logits, past = prefill(runtime, prompt, recalled)
    batch = len(prompt.inputs_embeds)
    mask = np.concatenate([recalled.slot_mask[:, None], prompt.attention_mask], 1)
    position = positions_of(prompt.attention_mask)[:, -1:]
    choosers = [Chooser(options) for _ in range(batch)]
    result = Generated([[] for _ in range(batch)], [False] * batch, timings.milliseconds, recalled)
    with timings.phase("decode"):
        while True:
            chosen = [
                choose(row) if not stopped else 0
                for choose, row, stopped in zip(choosers, logits[:, -1], result.stopped, strict=True)
            ]
            _append(result, chosen, options.stop_tokens, on_token)
            if all(result.stopped) or result.steps + 1 == options.max_new_tokens:
                return result
            # A finished row goes on with token 0 until the last is done; nobody reads what it says.
            mask = np.concatenate([mask, np.ones((batch, 1), np.int64)], 1)
            position = position + 1
            embeds = runtime.embed_tokens(np.asarray(chosen, np.int64)[:, None])
            logits, past = runtime.decode(embeds, mask, position, past)
            result.steps += 1


def teacher_force(
    runtime: Runtime, prompt: Prompt, answers: np.ndarray, recalled: Recall, timings: Timings | None = None
) -> np.ndarray:
    """Logits [B, n, V] that predict each of `answers` int64 [B, n] given those before it, in one call."""
    timings = timings or Timings()
    with timings.phase("embed"):
        embeds = runtime.embed_tokens(answers[:, :-1]) if answers.shape[1] > 1 else None
    if embeds is not None:
        prompt = Prompt(
            np.concatenate([prompt.inputs_embeds, embeds], 1),
            np.concatenate([prompt.attention_mask, np.ones(embeds.shape[:2], np.int64)], 1),
        )
    with timings.phase("prefill"):
        return prefill(runtime, prompt, recalled, answers.shape[1])[0]


def check_length(runtime: Runtime, prompt: Prompt, options: GenerationOptions) -> None:
    """UserError unless the longest row, the slot and the answer fit the model's positions."""
    limit = runtime.config.text.max_position_embeddings
    length = int(prompt.attention_mask.sum(1).max())
    if 1 + length + options.max_new_tokens > limit:
        raise UserError(
            f"the prompt is {length} tokens and the answer may be {options.max_new_tokens}, more than the "
            f"{limit - 1} of this model; shorten the prompt or give a smaller --max-new-tokens."
        )


class Chooser:
    """Picks one row's next token: greedy, or by temperature and top-p from a seeded generator."""

    def __init__(self, options: GenerationOptions):
        self.options = options
        self._generator = np.random.default_rng(options.seed)

    def __call__(self, logits: np.ndarray) -> int:
        """float32 [V] -> a token id; of equal logits the lowest. UserError where they are no numbers."""
        best = int(np.argmax(logits))
        if not np.isfinite(logits[best]):
            raise UserError("the model's logits are no numbers: its weights are damaged, copy them again.")
        if self.options.temperature == 0:
            return best
        order, cumulative = nucleus(logits, self.options.temperature, self.options.top_p)
        draw = self._generator.random() * cumulative[-1]
        return int(order[min(np.searchsorted(cumulative, draw, side="right"), len(order) - 1)])


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """The fewest most probable tokens that reach `top_p`, and their cumulative probabilities in float64.

    Holtzman et al. 2020, arXiv 1904.09751, section 3.1.
    """
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    cumulative = probabilities[order].cumsum()
    kept = int(np.searchsorted(cumulative, top_p)) + 1
    return order[:kept], cumulative[:kept]


def _append(
    result: Generated, chosen: list[int], stop_tokens: tuple[int, ...], on_token: OnToken | None
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
