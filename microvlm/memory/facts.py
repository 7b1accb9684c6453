"""Facts in an episodic memory, by text and picture: write once, read, forget, overwrite, reset, save, load.

The key of a fact is the encoding of how it will be asked for: the question, with the picture if there is one; its value
is that whole turn with the fact as its answer. A reading finds it by what the question means; to be forgotten or
overwritten it is named by the same words and picture. Works on any backend; needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from microvlm.commands.escaping import printable
from microvlm.errors import UserError
from microvlm.generation import GenerationOptions, Prompt, check_length, embed_prompt, generate
from microvlm.inputs.images import ImageSource
from microvlm.inputs.processor import Processor
from microvlm.memory.conversation import with_answer
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.memory_file import load_memory, save_memory
from microvlm.memory.query import Asked

if TYPE_CHECKING:
    from microvlm.backends.base import LoadedRuntime

SAME_KEY = 0.9997
"""Cosine from which two keys are one, for facts whose words are not known: those of older files.

Measured on nano, 12 questions about each of 27 pictures and about none: one question has .99977 or more between torch
and ONNX Runtime (1 within either), two paraphrases .99946 at most; of an earlier nano .9996 at most. A model whose
paraphrases are nearer may take one for the other, which is why words are logged.
"""


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
        query = self._query(self._asked(question, image))
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
        """Index of the newest fact written under these very words and this picture, the same on every backend.

        A fact from before the words were logged is found by its key. Raises UserError, which names the nearest fact,
        when there is none.
        """
        asked = self._asked(question, image)
        index = self.memory.asked(asked.question, asked.picture, read=self.processor.fold)
        if index is not None:
            return index
        query = self._query(asked)
        check_length(self.runtime, query, GenerationOptions(max_new_tokens=1))
        key = self.runtime.memory_encode(*query)[1][0]
        index = self._unlogged(key, len(self.entries))
        if index is None:
            raise UserError(f"nothing was written under that{self._nearest(asked, key)}.")
        return index

    def older(self, index: int) -> int | None:
        """Index of the newest fact before fact `index` that was written under the same; None when there is none."""
        entry = self.entries[index]
        found = None
        if entry.question is not None:
            fold = self.processor.fold
            found = self.memory.asked(fold(entry.question), entry.picture, before=index, read=fold)
        return self._unlogged(entry.key, index) if found is None else found

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

    def _asked(self, question: str, image: ImageSource | None) -> Asked:
        if image is None and not question:
            raise UserError("give a question, a picture or both.")
        return Asked.about(self.processor, question or self.processor.config.prompt.caption_prompt, image)

    def _query(self, asked: Asked) -> Prompt:
        return embed_prompt(self.runtime, *asked.inputs(self.processor), self.processor.image_id)

    def _unlogged(self, key: np.ndarray, before: int) -> int | None:
        """The newest of the rows before row `before` whose words are not known and whose key is `key`."""
        unlogged = [row for row in range(before) if self.entries[row].question is None]
        index, cosine = self.memory.nearest(key, unlogged)
        return index if cosine >= SAME_KEY else None

    def _nearest(self, asked: Asked, key: np.ndarray) -> str:
        """End of the sentence that nothing was found."""
        index, _ = self.memory.nearest(key)
        if index < 0:
            return ": the memory is empty"
        entry = self.entries[index]
        if entry.question is None:
            named = f'"{printable(entry.text)}"'
        else:
            about = "" if entry.picture == asked.picture else _about(entry.picture, asked.picture)
            named = f'asked for by "{printable(entry.question)}"{about}'
        return (
            f"; the nearest is entry {index + 1}, {named}: ask for it in those words, "
            f"or take it out with 'memory forget --entry {index + 1}'"
        )

    def _entry(self, text: str, question: str, image: ImageSource | None, label: str) -> Entry:
        if not text:
            raise UserError("give the text of the fact.")
        self.processor.check_signs(text)
        asked = self._asked(question or ("" if image is not None else text), image)
        query, tokens = self._query(asked), self.processor.text_ids(text)
        self._check_length(query, len(tokens))
        _, key = self.runtime.memory_encode(*query)
        code, _ = self.runtime.memory_encode(*with_answer(self.runtime, query, tokens))
        told = " ".join(part for part in (f"{label}:" if label else "", question, text) if part)
        return Entry(
            told, np.array(key[0]), np.array(code[0]), question=asked.question, picture=asked.picture
        )

    def _check_length(self, query: Prompt, tokens: int) -> None:
        """UserError unless the fact fits the model's positions as an answer to its question would."""
        try:
            check_length(self.runtime, query, GenerationOptions(max_new_tokens=max(1, tokens)))
        except UserError:
            limit = self.runtime.config.text.max_position_embeddings - 1
            raise UserError(
                f"the fact is {tokens} tokens and what it is asked for by {int(query.attention_mask.sum())}, "
                f"more than the {limit} of this model; shorten them."
            ) from None


def _about(picture: str, wanted: str) -> str:
    if not picture:
        return " without a picture"
    return " about another picture" if wanted else " about a picture"
