"""Facts in an episodic memory, by text and picture: write once, read, forget, overwrite, reset, save, load.

The key of a fact is the encoding of how it will be asked for: the question, with the picture if there is one; its value
is that whole turn with the fact as its answer. Works on any backend; needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from microvlm.episodic import Entry, EpisodicMemory
from microvlm.errors import UserError
from microvlm.generation import GenerationOptions, Prompt, embed_prompt, generate
from microvlm.images import ImageSource
from microvlm.memory_file import load_memory, save_memory
from microvlm.processor import Processor
from microvlm.session import with_answer

if TYPE_CHECKING:
    from microvlm.backends.base import LoadedRuntime

SAME_KEY = 0.999
"""Cosine from which two keys are one: backends differ in the last bits of a key, and other questions differ more."""


@dataclass(frozen=True)
class Recollection:
    """What asking the memory gave."""

    answer: str
    tokens: list[int]
    recalled: bool
    """Whether the memory was in scope, so that the answer could come from it."""
    scope: float
    """Probability that the memory answers the question."""
    residual: float
    """|z_r - z_q|, the distance of the reading from the question's own code."""
    timings_ms: dict[str, float]


class FactMemory:
    """A memory of one model. `memory` holds the states and the log; every method works on it at once."""

    def __init__(self, runtime: LoadedRuntime, processor: Processor, memory: EpisodicMemory | None = None):
        self.runtime, self.processor = runtime, processor
        self.memory = memory or EpisodicMemory.empty(runtime)

    @property
    def entries(self) -> list[Entry]:
        """The facts in the memory, oldest first."""
        return self.memory.entries

    def write(
        self, text: str, question: str = "", image: ImageSource | None = None, label: str = ""
    ) -> Entry:
        """Remember `text` as the answer to `question` about `image`; without both, under its own words.

        A picture without a question is asked for by the captioning prompt. `label` names the picture in the log. A fact
        under a question that is taken does not replace the older one: see `overwrite`. Raises UserError.
        """
        return self.memory.write(self.runtime, self._entry(text, question, image, label))

    def read(
        self, question: str = "", image: ImageSource | None = None, options: GenerationOptions | None = None
    ) -> Recollection:
        """Ask `question` about `image`, or about nothing but the memory. Changes nothing. Raises UserError."""
        query = self._query(question, image)
        options = options or GenerationOptions(
            max_new_tokens=self.processor.max_new_tokens, stop_tokens=self.processor.stop_tokens
        )
        made = generate(self.runtime, query, options, self.memory.states)
        reading = made.recall.reading
        assert reading is not None
        return Recollection(
            self.processor.decode(made.tokens[0]).strip(),
            made.tokens[0],
            bool(made.recall.slot_mask[0]),
            float(reading.scope[0]),
            float(reading.residual[0]),
            made.timings_ms,
        )

    def find(self, question: str = "", image: ImageSource | None = None) -> int:
        """Index of the newest fact written under `question` and `image`. Raises UserError when there is none."""
        _, key = self.runtime.memory_encode(*self._query(question, image))
        index, cosine = self.memory.nearest(key[0])
        if cosine < SAME_KEY:
            raise UserError("nothing was written under that; list the memory to see what was.")
        return index

    def forget(self, index: int) -> Entry:
        """Forget fact `index` (from 0), as if it had never been written. Raises UserError."""
        if not 0 <= index < len(self.entries):
            raise UserError(f"there is no entry {index + 1}: the memory has {len(self.entries)}.")
        return self.memory.forget(self.runtime, index)

    def overwrite(
        self, text: str, question: str = "", image: ImageSource | None = None, label: str = ""
    ) -> tuple[Entry, Entry]:
        """(forgotten, written): the fact under `question` and `image` becomes `text`. Raises UserError."""
        index = self.find(question, image)
        old = self.entries[index]
        return old, self.memory.overwrite(self.runtime, index, self._entry(text, question, image, label))

    def reset(self) -> None:
        """Back to the empty memory."""
        self.memory = EpisodicMemory.empty(self.runtime)

    def rebuild(self) -> float:
        """See `EpisodicMemory.rebuild`."""
        return self.memory.rebuild(self.runtime)

    def save(self, path: str | Path) -> None:
        """See `save_memory`."""
        save_memory(self.memory, path, self.runtime.fingerprint)

    def load(self, path: str | Path) -> None:
        """See `load_memory`."""
        self.memory = load_memory(path, self.runtime.fingerprint)

    def _query(self, question: str, image: ImageSource | None) -> Prompt:
        if image is None and not question:
            raise UserError("give a question, a picture or both.")
        asked = question or self.processor.config.prompt.caption_prompt
        inputs = self.processor([asked], [[] if image is None else [image]])
        return embed_prompt(self.runtime, *inputs, self.processor.image_id)

    def _entry(self, text: str, question: str, image: ImageSource | None, label: str) -> Entry:
        if not text:
            raise UserError("give the text of the fact.")
        query = self._query(question or ("" if image is not None else text), image)
        _, key = self.runtime.memory_encode(*query)
        code, _ = self.runtime.memory_encode(*with_answer(self.runtime, query, self.processor.text_ids(text)))
        told = " ".join(part for part in (f"{label}:" if label else "", question, text) if part)
        return Entry(told, np.array(key[0]), np.array(code[0]))
