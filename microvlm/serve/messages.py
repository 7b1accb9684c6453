"""What server and worker say to each other: frames of MessagePack with a length before them.

A frame is four bytes, its length in little-endian order, and a `Job` (to the worker) or an `Event` (from it). Neither
side runs what the other sends. A memory's rows are opaque bytes to the server, which keeps them for the next worker.
"""

from __future__ import annotations

import struct
from typing import Any, Literal

import msgspec
from msgspec import Struct

LENGTH = struct.Struct("<I")
LONGEST_FRAME = 256_000_000


class ModelSpec(Struct, frozen=True):
    """A model that the server was started with."""

    name: str
    """How requests name it."""
    source: str
    backend: str
    threads: int | Literal["auto"] | None = None


class Sampling(Struct, frozen=True):
    """How an answer's tokens are chosen; None is the model's default."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


class Job(Struct, frozen=True, omit_defaults=True):
    """Something for the worker to do."""

    kind: Literal["load", "ask", "tell", "forget", "evidence", "attention"]
    model: ModelSpec
    memory: str = ""
    """Name of the memory, by which the worker finds the one that it holds; empty for a new one that nobody keeps."""
    revision: int = 0
    """How often that memory has changed. A worker that holds no such revision asks for its rows."""
    rows: list[bytes] | None = None
    question: str = ""
    text: str = ""
    label: str = ""
    picture: bytes | None = None
    entry: int = 0
    sampling: Sampling = Sampling()
    pixels: int = 0
    """The most pixels of the picture."""
    turns: int = 0
    """The most rows of a memory that nobody told."""


class NewRow(Struct, frozen=True):
    """A row that was written into a memory."""

    content: bytes
    view: dict[str, Any]
    """What the page shows of it."""


class Event(Struct, frozen=True, omit_defaults=True):
    """What the worker tells about a job. The last event is `done`, `missing`, `refused` or `defect`."""

    kind: Literal["begun", "text", "progress", "done", "missing", "refused", "defect"]
    text: str = ""
    """A piece of the answer, or the sentence of a refusal."""
    status: int = 0
    code: str = ""
    value: dict[str, Any] = {}
    removed: list[int] = []
    """Indices of rows, among those before the job, that the memory lost."""
    added: list[NewRow] = []

    @property
    def is_last(self) -> bool:
        return self.kind not in ("begun", "text", "progress")


def pack(message: Job | Event) -> bytes:
    """A frame with its length."""
    content = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(content)) + content


def unpack(content: bytes, kind: type[Job] | type[Event]) -> Any:
    """A frame's content -> its message. Raises ValueError for anything else."""
    return msgspec.msgpack.decode(content, type=kind)
