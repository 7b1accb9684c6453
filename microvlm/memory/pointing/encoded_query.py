"""What the memory encoder makes of a query: of the whole, and of its picture and its words alone.

The key of the whole finds entries. The keys of the parts tell another view of the same picture under other words from a
picture like it under the same words, which are as near to the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np

from microvlm.generation import Prompt, embed_prompt, place_images
from microvlm.inputs.processor import Processor
from microvlm.memory.query import Query
from microvlm.runtime import Runtime


class EntryArrays(TypedDict):
    """What an `Entry` keeps of its query."""

    key: np.ndarray
    cue: np.ndarray
    picture_key: np.ndarray | None
    question_key: np.ndarray


class EncodedQuery(NamedTuple):
    """N queries, float32."""

    key: np.ndarray
    """w [N, K]."""
    latent: np.ndarray
    """z [N, C]."""
    picture_key: np.ndarray
    """w of the picture under the captioning prompt [N, K]; zeros without a picture."""
    question_key: np.ndarray
    """w of the words without a picture [N, K]."""

    @property
    def has_picture(self) -> np.ndarray:
        """bool [N]"""
        return np.abs(self.picture_key).max(1, initial=0) > 0

    def rows(self, chosen: np.ndarray) -> EncodedQuery:
        """Some of the queries."""
        return EncodedQuery(*(part[chosen] for part in self))

    def entry_arrays(self) -> EntryArrays:
        """The arrays of an `Entry` that is asked for by this query, batch 1, by their names.

        Copies: a row of a batch of one would keep the batch's array alive beside itself.
        """
        picture_key = np.array(self.picture_key[0])
        return {
            "key": np.array(self.key[0]),
            "cue": np.array(self.latent[0]),
            "picture_key": picture_key if picture_key.any() else None,
            "question_key": np.array(self.question_key[0]),
        }


def joined(queries: Sequence[EncodedQuery]) -> EncodedQuery:
    """The queries of all of them, in order."""
    return EncodedQuery(*(np.concatenate(parts) for parts in zip(*queries, strict=True)))


def encode_query(
    runtime: Runtime, processor: Processor, query: Query, prompt: Prompt, to_read: bool = False
) -> EncodedQuery:
    """Encode a query whose `prompt`, batch 1, is embedded already -> batch 1.

    `to_read`: leave out the parts, as zeros, where the model's confidence does not look at them.
    """
    latent, key = runtime.memory_encode(*prompt)
    if query.pixels is None:
        return EncodedQuery(key, latent, np.zeros_like(key), key)
    if to_read and runtime.config.memory.pointing.same_picture is None:
        return EncodedQuery(key, latent, np.zeros_like(key), np.zeros_like(key))
    caption = query.captioned(processor)
    picture_key = key
    if caption.question != query.question:
        _, picture_key = runtime.memory_encode(*same_picture(runtime, processor, query, prompt, caption))
    _, question_key = runtime.memory_encode(*text_prompt(runtime, processor, query.question))
    return EncodedQuery(key, latent, picture_key, question_key)


def same_picture(
    runtime: Runtime, processor: Processor, query: Query, prompt: Prompt, other: Query
) -> Prompt:
    """The prompt of `other` about the picture of `query`, whose features are taken from its `prompt`."""
    ids, other_ids = (np.array([processor.prompt_ids(each.question, 1)], np.int64) for each in (query, other))
    features = prompt.inputs_embeds[ids == processor.image_id]
    mask = np.ones_like(other_ids)
    embeds = place_images(runtime.embed_tokens(other_ids), other_ids, processor.image_id, features[None])
    return Prompt(embeds, mask)


def text_prompt(runtime: Runtime, processor: Processor, question: str) -> Prompt:
    """Embed a question without a picture, batch 1, for the decoder or the memory encoder."""
    return embed_prompt(runtime, *processor([question]), processor.image_id)
