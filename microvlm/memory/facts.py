"""Facts in an episodic memory, by text and image: write, read, forget, overwrite, reset, save and load.

The key of a fact encodes the question that will ask for it, with the image if there is one. Its value is the whole
turn, with the fact as the answer. Reading finds a fact by the meaning of a question and says the fact's own text;
forgetting and overwriting name it by the same words and image. Works on any backend, without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.generation import GenerationOptions, Prompt, Timings, check_length, embed_prompt, generate
from microvlm.inputs.images import ImageSource
from microvlm.inputs.processor import Processor
from microvlm.loaded_model import complete_options, runtime_and_processor
from microvlm.memory.conversation import with_answer
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.memory_file import open_memory, store_memory
from microvlm.memory.pointing.encoded_query import encode_query
from microvlm.memory.pointing.pointer import NOT_FOUND, find_entry
from microvlm.memory.query import Query, normalize_question

if TYPE_CHECKING:
    from microvlm.loaded_model import ModelSource

SAME_KEY = 0.9997
"""Two keys with at least this cosine count as one. Used only for facts whose words are unknown, in older files.

Measured on nano with 12 questions about each of 27 images and about none: the same question has .99977 or more between
torch and ONNX Runtime (1 within either), two paraphrases have .99946 at most (.9996 with an earlier nano). A model with
closer paraphrases may confuse two facts, which is why the words are logged.
"""


Source = Literal["entry", "decoder"]
"""What answers: the text of the entry that the reading points at, or what the decoder says from the reading alone."""


@dataclass(frozen=True)
class FactReading:
    """The answer to a question and what the memory had to do with it."""

    answer: str
    """The entry's own text or `NOT_FOUND`; from the decoder, whatever it says."""
    tokens: list[int]
    """Token ids of the answer."""
    from_memory: bool
    """Whether the answer is an entry's; from the decoder, whether the memory was in scope and the reading seen."""
    scope: float
    """Probability of the scope detector that the memory answers the question."""
    residual: float
    """|z_r - z_q|, the distance between the reading and the question's own latent."""
    timings_ms: dict[str, float]
    """Milliseconds by phase."""
    entry: int | None = None
    """Index of the entry that the reading points at clearly."""
    confidence: float = 0.0
    """Probability that the entry which the reading points at answers the question."""
    source: Source = "entry"


class FactMemory:
    """Facts that one model remembers. `memory` holds the states and the log; every method changes it at once."""

    def __init__(
        self,
        model: ModelSource,
        processor: Processor | None = None,
        memory: EpisodicMemory | None = None,
    ):
        """`model` is what `microvlm.load` or `MicroVLM.from_pretrained` returned, or a runtime with its `processor`."""
        self.runtime, self.processor = runtime_and_processor(model, processor)
        self.memory = memory or EpisodicMemory.empty(self.runtime)
        self.memory.write_pending(self.runtime)

    @property
    def entries(self) -> list[Entry]:
        """The facts in the memory, oldest first."""
        return self.memory.entries

    def write(
        self, text: str, question: str = "", image: ImageSource | None = None, label: str = ""
    ) -> Entry:
        """Remember `text` as the answer to `question` about `image`; without both, under its own words.

        An image without a question is asked for with the captioning prompt. `label` names the image in the log. A
        second fact under the same question and image does not replace the first: see `overwrite`. Raises UserError.
        """
        return self.memory.write(self.runtime, self._entry(text, question, image, label))

    def read(
        self,
        question: str = "",
        image: ImageSource | None = None,
        options: GenerationOptions | None = None,
        source: Source = "entry",
    ) -> FactReading:
        """Answer `question` about `image`, or from the memory alone, by an entry's own text or `NOT_FOUND`.

        `source="decoder"`: what the decoder says, which knows only the words that it was trained on; `options` are for
        it. Changes nothing. Raises UserError.
        """
        if source not in ("entry", "decoder"):
            raise UserError(f"source= is {source!r}; give 'entry' or 'decoder'.")
        options = complete_options(self.processor, options)
        timings = Timings()
        query = self._query(question, image)
        prompt = self._prompt(query, timings)
        check_length(self.runtime, prompt, GenerationOptions(max_new_tokens=1))
        with timings.phase("memory_read"):
            encoded = encode_query(self.runtime, self.processor, query, prompt, to_read=True)
            pointing = find_entry(self.runtime, self.memory, encoded)
        from_memory = pointing.entry is not None
        answer = NOT_FOUND if pointing.entry is None else self.entries[pointing.entry].value
        if source == "entry":
            tokens = self.processor.text_ids(answer)
        else:
            result = generate(self.runtime, prompt, options, self.memory.states, timings=timings)
            tokens, from_memory = result.tokens[0], bool(result.memory_slot.slot_mask[0])
            answer = self.processor.decode(tokens).strip()
        return FactReading(
            answer,
            tokens,
            from_memory,
            float(pointing.reading.scope[0]),
            float(pointing.reading.residual[0]),
            timings.milliseconds,
            pointing.entry,
            pointing.confidence,
            source,
        )

    def find(self, question: str = "", image: ImageSource | None = None) -> int:
        """Index of the newest fact that was written under these words and this image, the same on every backend.

        Facts of older files, without logged words, are found by their key. Raises UserError, which names the nearest
        fact, when there is none.
        """
        query = self._query(question, image)
        index = self.memory.find(query.question, query.picture, normalize=self._normalize)
        if index is not None:
            return index
        prompt = self._prompt(query)
        check_length(self.runtime, prompt, GenerationOptions(max_new_tokens=1))
        key = self.runtime.memory_encode(*prompt)[1][0]
        index = self._find_unlogged(key, len(self.entries))
        if index is None:
            raise UserError(f"nothing was written under that{self._describe_nearest(query, key)}.")
        return index

    def older(self, index: int) -> int | None:
        """Index of the newest fact before fact `index` under the same question and image, or None."""
        entry = self.entries[index]
        older = None
        if entry.question is not None:
            question = self._normalize(entry.question)
            older = self.memory.find(question, entry.picture, before=index, normalize=self._normalize)
        return self._find_unlogged(entry.key, index) if older is None else older

    def forget(self, index: int) -> Entry:
        """Forget fact `index` (from 0), as if it had never been written. Raises UserError."""
        if not 0 <= index < len(self.entries):
            raise UserError(f"there is no entry {index + 1}: the memory has {len(self.entries)}.")
        return self.memory.forget(self.runtime, index)

    def overwrite(
        self, text: str, question: str = "", image: ImageSource | None = None, label: str = ""
    ) -> tuple[Entry, Entry]:
        """Replace the fact under `question` and `image` by `text` -> (old entry, new entry). Raises UserError."""
        index = self.find(question, image)
        old = self.entries[index]
        return old, self.memory.overwrite(self.runtime, index, self._entry(text, question, image, label))

    def reset(self) -> None:
        """Forget all facts."""
        self.memory = EpisodicMemory.empty(self.runtime)

    def rebuild(self) -> float:
        """Write all facts into an empty memory -> the drift that this removed. See `EpisodicMemory.rebuild`."""
        return self.memory.rebuild(self.runtime)

    def save(self, path: str | Path) -> None:
        """Bring a file up to date. See `store_memory`."""
        store_memory(self.memory, path, self.runtime.fingerprint)

    def load(self, path: str | Path) -> None:
        """Replace the facts by a file's. See `open_memory`."""
        self.memory = open_memory(path, self.runtime)

    def _query(self, question: str, image: ImageSource | None) -> Query:
        if image is None and not question:
            raise UserError("give a question, a picture or both.")
        return Query.build(self.processor, question or self.processor.config.prompt.caption_prompt, image)

    def _normalize(self, question: str) -> str:
        return normalize_question(self.processor, question)

    def _prompt(self, query: Query, timings: Timings | None = None) -> Prompt:
        return embed_prompt(self.runtime, *query.inputs(self.processor), self.processor.image_id, timings)

    def _find_unlogged(self, key: np.ndarray, before: int) -> int | None:
        """Index of the newest row before row `before` without logged words and with this key, or None."""
        unlogged = [row for row in range(before) if self.entries[row].question is None]
        index, cosine = self.memory.nearest(key, unlogged)
        return index if cosine >= SAME_KEY else None

    def _describe_nearest(self, query: Query, key: np.ndarray) -> str:
        """End of the error sentence of `find`: the nearest fact and how to name it."""
        index, _ = self.memory.nearest(key)
        if index < 0:
            return ": the memory is empty"
        entry = self.entries[index]
        if entry.question is None:
            name = f'"{printable(entry.text)}"'
        else:
            difference = (
                "" if entry.picture == query.picture else _picture_difference(entry.picture, query.picture)
            )
            name = f'asked for by "{printable(entry.question)}"{difference}'
        return (
            f"; the nearest is entry {index + 1}, {name}: ask for it in those words, "
            f"or take it out with 'memory forget --entry {index + 1}'"
        )

    def _entry(self, text: str, question: str, image: ImageSource | None, label: str) -> Entry:
        if not text:
            raise UserError("give the text of the fact.")
        self.processor.reject_special_tokens(text)
        query = self._query(question or ("" if image is not None else text), image)
        prompt, tokens = self._prompt(query), self.processor.text_ids(text)
        self._check_length(prompt, len(tokens))
        encoded = encode_query(self.runtime, self.processor, query, prompt)
        latent, _ = self.runtime.memory_encode(*with_answer(self.runtime, prompt, tokens))
        log_text = " ".join(part for part in (f"{label}:" if label else "", question, text) if part)
        return Entry(
            log_text,
            latent=np.array(latent[0]),
            question=query.question,
            picture=query.picture,
            value_start=len(log_text) - len(text),
            **encoded.entry_arrays(),
        )

    def _check_length(self, prompt: Prompt, tokens: int) -> None:
        """Raise UserError unless the fact, as an answer to its question, fits the model's positions."""
        try:
            check_length(self.runtime, prompt, GenerationOptions(max_new_tokens=max(1, tokens)))
        except UserError:
            limit = self.runtime.config.text.max_position_embeddings - 1
            raise UserError(
                f"the fact is {tokens} tokens and its question {int(prompt.attention_mask.sum())}, "
                f"more than the {limit} of this model; shorten them."
            ) from None


def _picture_difference(entry_picture: str, query_picture: str) -> str:
    if not entry_picture:
        return " without a picture"
    return " about another picture" if query_picture else " about a picture"
