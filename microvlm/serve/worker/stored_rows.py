"""Rows of an episodic memory as bytes, which the server keeps while workers die, and as what a page shows of them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.runtime import Runtime

_DIGITS = 4


class _Row(Struct, frozen=True):
    """An `Entry`; arrays are float32 in little-endian order."""

    text: str
    key: bytes
    latent: bytes
    time: float
    image: bool
    question: str | None
    picture: str
    value_start: int | None
    told: bool
    cue: bytes | None
    picture_key: bytes | None
    question_key: bytes | None


def encode_row(entry: Entry) -> bytes:
    """An entry without the number of its state, which depends on the others."""
    return msgspec.msgpack.encode(
        _Row(
            entry.text,
            _bytes(entry.key) or b"",
            _bytes(entry.latent) or b"",
            entry.time,
            entry.image,
            entry.question,
            entry.picture,
            entry.value_start,
            entry.told,
            _bytes(entry.cue),
            _bytes(entry.picture_key),
            _bytes(entry.question_key),
        )
    )


def memory_of(runtime: Runtime, rows: list[bytes]) -> EpisodicMemory:
    """A memory that `rows` are written into in order. Raises ValueError for what `encode_row` did not make."""
    memory = EpisodicMemory.empty(runtime)
    for content in rows:
        row = msgspec.msgpack.decode(content, type=_Row)
        entry = Entry(
            row.text,
            _required(row.key),
            _required(row.latent),
            row.time,
            row.image,
            question=row.question,
            picture=row.picture,
            value_start=row.value_start,
            told=row.told,
            cue=_array(row.cue),
            picture_key=_array(row.picture_key),
            question_key=_array(row.question_key),
        )
        memory.write(runtime, entry)
    return memory


def view_of(entry: Entry) -> dict[str, Any]:
    """What a page shows of an entry. `weights` are the addressing weights over the slots, rounded."""
    return {
        "text": entry.value,
        "question": entry.question or "",
        "told": entry.told,
        "about_picture": bool(entry.picture),
        "memory": entry.memory,
        "weights": [round(float(weight), _DIGITS) for weight in entry.key],
    }


def _bytes(array: np.ndarray | None) -> bytes | None:
    return None if array is None else np.asarray(array, "<f4").tobytes()


def _array(content: bytes | None) -> np.ndarray | None:
    return None if content is None else _required(content)


def _required(content: bytes) -> np.ndarray:
    return np.frombuffer(content, "<f4").astype(np.float32)
