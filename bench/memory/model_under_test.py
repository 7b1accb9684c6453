"""The model of a memory benchmark: encodes questions about pictures, and answers them, on any backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from microvlm.backends.base import LoadedRuntime
from microvlm.generation import (
    GenerationOptions,
    Prompt,
    embed_prompt,
    generate,
    place_images,
    read_slot,
)
from microvlm.inputs.processor import Processor
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.in_place import hold
from microvlm.runtime import Memories, MemoryReading

BATCH = 16
Query = tuple[str, np.ndarray | None]
"""A question and the picture that it is about, uint8 [S, S, 3]."""


class ModelUnderTest:
    """One runtime with its processor. Answers are greedy and at most `new_tokens` long."""

    def __init__(self, runtime: LoadedRuntime, processor: Processor, new_tokens: int = 8):
        self.runtime, self.processor = runtime, processor
        self.options = GenerationOptions(max_new_tokens=new_tokens, stop_tokens=processor.stop_tokens)

    @property
    def slots(self) -> int:
        return self.runtime.config.memory.slots

    def encode(self, queries: Sequence[Query]) -> tuple[np.ndarray, np.ndarray]:
        """(latents [N, C], keys [N, K]) of questions, as reading encodes them."""
        pairs = [self.runtime.memory_encode(*self.prompt(part)) for part in _batches(queries)]
        return np.concatenate([latent for latent, _ in pairs]), np.concatenate([key for _, key in pairs])

    def encode_values(self, queries: Sequence[Query], answers: Sequence[str]) -> np.ndarray:
        """Latents [N, C] of whole turns: each question with its answer."""
        latents = []
        for start in range(0, len(queries), BATCH):
            part = slice(start, start + BATCH)
            turns = self.with_answers(self.prompt(queries[part]), answers[part])
            latents.append(self.runtime.memory_encode(*turns)[0])
        return np.concatenate(latents)

    def prompt(self, queries: Sequence[Query]) -> Prompt:
        """One batch, padded on the left."""
        images = [[] if image is None else [image] for _, image in queries]
        inputs = self.processor([question for question, _ in queries], images)
        return embed_prompt(self.runtime, *inputs, self.processor.image_id)

    def prompt_with_features(
        self, question: str, picture: np.ndarray | None, features: dict[int, np.ndarray]
    ) -> Prompt:
        """One question, batch 1. `features` keeps those of each picture, by the array's id, for its next question."""
        images = [[] if picture is None else [picture]]
        ids, mask, pixels = self.processor([question], images)
        embeds = self.runtime.embed_tokens(ids)
        if picture is None or pixels is None:
            return Prompt(embeds, mask)
        if id(picture) not in features:
            features[id(picture)] = np.array(self.runtime.encode_image(pixels))
        return Prompt(place_images(embeds, ids, self.processor.image_id, features[id(picture)]), mask)

    def answers(
        self, queries: Sequence[Query], memory: Memories | None, new_tokens: int | None = None
    ) -> list[str]:
        """The model's answers, perhaps of another length; all questions share `memory`."""
        options = self.options
        if new_tokens is not None:
            options = dataclasses.replace(options, max_new_tokens=new_tokens)
        answers: list[str] = []
        for part in _batches(queries):
            tokens = generate(self.runtime, self.prompt(part), options, memory).tokens
            answers += [self.processor.decode(row).strip() for row in tokens]
        return answers

    def readings(self, queries: Sequence[Query], memory: Memories) -> list[MemoryReading]:
        """The memory's readings, one for each batch of questions."""
        readings = [read_slot(self.runtime, self.prompt(part), memory).reading for part in _batches(queries)]
        return [reading for reading in readings if reading is not None]

    def remember(self, keys: np.ndarray, latents: np.ndarray, single: bool = False) -> EpisodicMemory:
        """A memory with these rows, in as many states as they need, or all in one."""
        entries = [
            Entry(str(number), key, latent, time=0.0)
            for number, (key, latent) in enumerate(zip(keys, latents, strict=True))
        ]
        memory = EpisodicMemory.empty(self.runtime)
        if not single:
            for entry in entries:
                memory.write(self.runtime, entry)
            return memory
        held_memory = hold(self.runtime, memory.states[0])
        for entry in entries:
            held_memory.write(*entry.row)
        return EpisodicMemory([held_memory.snapshot()], entries)

    @contextmanager
    def gate_open(self) -> Iterator[None]:
        """Inside this context every reading reaches the decoder, whatever the scope detector says."""
        config = self.runtime.config
        always = dataclasses.replace(config.memory, scope_threshold=0.0)
        self.runtime.config = dataclasses.replace(config, memory=always)
        try:
            yield
        finally:
            self.runtime.config = config

    def with_answers(self, prompt: Prompt, answers: Sequence[str]) -> Prompt:
        """The answers' tokens behind the prompts, padded on the right."""
        rows = [self.processor.text_ids(answer) for answer in answers]
        ids = np.full((len(rows), max(map(len, rows))), self.processor.pad_id, np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        embeds = self.runtime.embed_tokens(ids)
        return Prompt(
            np.concatenate([prompt.inputs_embeds, embeds], 1),
            np.concatenate([prompt.attention_mask, mask], 1),
        )


def _batches(queries: Sequence[Query]) -> Iterator[Sequence[Query]]:
    for start in range(0, len(queries), BATCH):
        yield queries[start : start + BATCH]
