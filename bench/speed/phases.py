"""The timed phases over real evaluation images, and what one repeat of each does.

load          a fresh process, libraries imported: hashes checked, weights and sessions ready
vision        pixels -> prefix embeddings
memory_write  encode the key and the fact, write one row
memory_read   encode the query, read, project to the slot
prefill       prefix and prompt -> first logits, with the slot
decode        one new token: embed it and run the decoder on the cache
end_to_end    image file -> caption: decoding the file, processor, vision, prefill, tokens, text
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from microvlm.generation import (
    GenerationOptions,
    Prompt,
    check_length,
    embed_prompt,
    generate,
    positions_of,
    prefill,
    read_slot,
)
from microvlm.inputs.processor import Processor
from microvlm.runtime import Past, Runtime

PHASES = ("load", "vision", "memory_write", "memory_read", "prefill", "decode", "end_to_end")


@dataclass(frozen=True)
class Workload:
    """Inputs of the phases, the same for every backend."""

    images: tuple[str, ...]
    captions: tuple[str, ...]
    question: str = "what was in the first image?"
    new_tokens: int = 16


class PhaseRunner:
    """Prepares the inputs of each phase once, untimed. `run(phase, index)` times one repeat."""

    def __init__(self, runtime: Runtime, processor: Processor, workload: Workload):
        self.runtime, self.processor, self.workload = runtime, processor, workload
        text = processor.config.prompt.caption_prompt
        self._pixels = [processor.pixels(Path(file))[None] for file in workload.images]
        inputs = [processor([text], [[file]]) for file in workload.images]
        self._prompts = [embed_prompt(runtime, *prompt, processor.image_id) for prompt in inputs]
        captioned = zip(workload.images, workload.captions, strict=True)
        self._facts = [self._fact(file, caption) for file, caption in captioned]
        self._question = embed_prompt(runtime, *processor([workload.question], None), processor.image_id)
        for prompt in self._prompts:
            check_length(runtime, prompt, GenerationOptions(max_new_tokens=workload.new_tokens))
        self._state = runtime.memory_prior()
        self._options = GenerationOptions(
            max_new_tokens=workload.new_tokens, stop_tokens=processor.stop_tokens
        )
        for index in range(len(workload.images)):
            self._state = self._write_fact(index)
        self._phases: dict[str, Callable[[int], float]] = {
            "vision": self._vision,
            "memory_write": self._memory_write,
            "memory_read": self._memory_read,
            "prefill": self._prefill,
            "decode": self._decode,
            "end_to_end": self._end_to_end,
        }

    def run(self, phase: str, index: int) -> float:
        """One repeat on image `index` modulo their number -> milliseconds, per token for `decode`."""
        return self._phases[phase](index % len(self.workload.images))

    def _fact(self, file: str, caption: str) -> Prompt:
        ids = self.processor.prompt_ids(self.processor.config.prompt.caption_prompt, 1)
        turn = np.asarray([ids + self.processor.text_ids(caption)], np.int64)
        pixels = self.processor.pixels(Path(file))[None]
        return embed_prompt(self.runtime, turn, np.ones_like(turn), pixels, self.processor.image_id)

    def _write_fact(self, index: int) -> Any:
        latent, _ = self.runtime.memory_encode(*self._facts[index])
        _, key = self.runtime.memory_encode(*self._question)
        return self.runtime.memory_write(key, latent, self._state)

    def _vision(self, index: int) -> float:
        return clock(lambda: self.runtime.encode_image(self._pixels[index]))

    def _memory_write(self, index: int) -> float:
        return clock(lambda: self._write_fact(index))

    def _memory_read(self, index: int) -> float:
        return clock(lambda: read_slot(self.runtime, self._question, self._state))

    def _prefill(self, index: int) -> float:
        memory_slot = read_slot(self.runtime, self._prompts[index], None)
        return clock(lambda: prefill(self.runtime, self._prompts[index], memory_slot))

    def _decode(self, index: int) -> float:
        """`new_tokens` greedy steps after a prefill; stop tokens do not stop it."""
        prompt = self._prompts[index]
        memory_slot = read_slot(self.runtime, prompt, None)
        logits, past = prefill(self.runtime, prompt, memory_slot)
        mask = np.concatenate([memory_slot.slot_mask[:, None], prompt.attention_mask], 1)
        position = positions_of(prompt.attention_mask)[:, -1:]
        steps = self.workload.new_tokens
        return clock(lambda: self._steps(steps, logits, past, mask, position)) / steps

    def _steps(
        self, steps: int, logits: np.ndarray, past: Past, mask: np.ndarray, position: np.ndarray
    ) -> None:
        for _ in range(steps):
            token = logits[:, -1].argmax(-1).astype(np.int64)
            mask = np.concatenate([mask, np.ones((1, 1), np.int64)], 1)
            position = position + 1
            logits, past = self.runtime.decode(
                self.runtime.embed_tokens(token[:, None]), mask, position, past
            )

    def _end_to_end(self, index: int) -> float:
        return clock(lambda: self._caption(self.workload.images[index]))

    def _caption(self, file: str) -> str:
        text = self.processor.config.prompt.caption_prompt
        inputs = self.processor([text], [[file]])
        prompt = embed_prompt(self.runtime, *inputs, self.processor.image_id)
        return self.processor.decode(generate(self.runtime, prompt, self._options).tokens[0])


def clock(action: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1e3


def phases_to_run() -> tuple[str, ...]:
    """Names of the phases in the data path's order; `load` is measured when a worker starts."""
    return tuple(phase for phase in PHASES if phase != "load")
