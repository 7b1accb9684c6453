"""The headers of frames as typed records: neither side believes what the other sends.

Imports msgspec, which a device has once its packages are there; `frames` and the installer, which come before, do
without.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.formats import documents
from microvlm.formats.documents import Count

REMEDY = "use the same microvlm on both sides"
LONGEST_SENTENCE = 1000
"""Characters of another side's sentence that are shown."""
Words = Annotated[str, Meta(max_length=4096)]
Name = Annotated[str, Meta(pattern=r"^(?!\.)[^/\\\x00]{1,200}\Z")]
"""A name that stays in the folder that it is joined to."""
RelativePath = Annotated[str, Meta(pattern=r"^(?!/)(?!(.*/)?\.\.(/|\Z))[^\\\x00]{1,400}\Z")]
T = TypeVar("T")


class Reply(msgspec.Struct, frozen=True):
    """What every answer may have."""

    id: int | None = None
    """Of the request; None where the worker is about to end."""
    error: str | None = None
    damaged: Literal["bundle", "packages"] | None = None
    event: Words | None = None

    @property
    def sentence(self) -> str:
        """The error, safe to print."""
        return printable(self.error or "the worker ended.")[:LONGEST_SENTENCE]


class DeviceFacts(msgspec.Struct, frozen=True):
    """See `machine_facts.describe`."""

    machine: Words
    cpu: Words
    board: Words = ""
    features: list[Words] = []
    hwcap: int | None = None
    cores: Count | None = None
    memory_bytes: Count | None = None
    system: Words = ""
    c_library: Words = ""
    python: Words = ""
    onnxruntime: Words | None = None


class Loaded(msgspec.Struct, frozen=True):
    """The answer to `load`."""

    device: DeviceFacts
    kernels: Words
    threads: Count


class Shapes(msgspec.Struct, frozen=True):
    """The answer to `run`: shapes of the values that stay on the device, by number; the others follow as tensors."""

    shapes: dict[str, list[Count]]


class TokenEvent(msgspec.Struct, frozen=True):
    """An event of `speak`: row and token."""

    token: tuple[Count, Count]


class Spoken(msgspec.Struct, frozen=True):
    """The answer to `speak`."""

    tokens: list[list[Count]]
    stopped: list[bool]
    steps: Count
    timings_ms: dict[Words, float]
    log_probabilities: list[list[Annotated[float, Meta(le=0)]]]
    """Of every chosen token per row; one more than `tokens` has where the row stopped."""

    def __post_init__(self) -> None:
        rows = list(zip(self.tokens, self.stopped, strict=False))
        if len(rows) != max(len(self.tokens), len(self.stopped)):
            raise ValueError("there are other numbers of answers than of their ends")
        if [len(tokens) + stopped for tokens, stopped in rows] != list(map(len, self.log_probabilities)):
            raise ValueError("there are other numbers of log probabilities than of tokens")


class Load(msgspec.Struct, frozen=True):
    """The request `load`."""

    bundle: Words
    settings: dict[Words, Any] = {}


class Run(msgspec.Struct, frozen=True):
    """The request `run`; see `GraphServer`."""

    graph: Name
    inputs: list[Count | None]
    keep: list[Count | None]
    names: list[Words] | None = None
    outputs: list[Words] = []


class Fetch(msgspec.Struct, frozen=True):
    """The request `fetch`: the number of a kept value."""

    value: Count


class Open(msgspec.Struct, frozen=True):
    """The request `open`; the model is the request's tensor."""

    graph: Name
    folder: RelativePath


class Speak(msgspec.Struct, frozen=True):
    """The request `speak`; `options` are fields of GenerationOptions, which checks their values."""

    inputs: list[Count | None]
    options: dict[Words, Any]


class DevicePython(msgspec.Struct, frozen=True):
    """The installer's answer to `look`."""

    python: Annotated[str, Meta(pattern=r"^\d{1,3}\.\d{1,3}\Z")]
    machine: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_]{1,64}\Z")]
    bits: Count
    c_library: tuple[Words, Words]
    versions: dict[Words, Words | None]
    root: Words


class Missing(msgspec.Struct, frozen=True):
    """The installer's answer to `missing`: bytes of each missing file that have come already."""

    missing: dict[str, Count]
    marked: bool


class Exists(msgspec.Struct, frozen=True):
    """The installer's answer to `exists`."""

    exists: bool


def parse(header: dict[str, Any], kind: type[T], origin: str) -> T:
    """A header -> a record. Raises UserError, a sentence with the name of the entry."""
    try:
        return msgspec.convert(header, kind)
    except (msgspec.ValidationError, RecursionError):
        return documents.convert(header, kind, origin, REMEDY)  # once more, for the sentence


def take(tensors: list[Any], count: int, origin: str) -> list[Any]:
    """The tensors of a frame that must have `count` of them. Raises UserError."""
    if len(tensors) != count:
        raise UserError(f"{origin}: it has {len(tensors)} tensors in place of {count}: {REMEDY}.")
    return tensors
