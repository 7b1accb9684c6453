"""What every source yields, record by record: the pictures, what is said about them, or why there is neither."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from microvlm.training.data.annotations import Annotations
from microvlm.training.data.caption_data import Turn

NO_PICTURE = "no picture named"
MISSING = "missing picture"
URL = "a URL, not a file"
EMPTY = "empty file"
NOT_A_PICTURE = "not a picture"
DAMAGED = "damaged picture"
TOO_LARGE = "picture too large"
TOO_SMALL = "picture too small"
UNREADABLE = "picture cannot be read"
NO_CAPTION = "no caption"
LONG_CAPTION = "caption too long"
CONTROL_CHARACTERS = "control characters in a caption"
NOT_UTF8 = "caption is not UTF-8"
BAD_RECORD = "damaged record"
DUPLICATE = "same picture and text again"
TWO_SPLITS = "pictures already in different splits"


class BadRecord(Exception):
    """A record that cannot be used: the reason, one of this module's constants, and details."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Picture(NamedTuple):
    """A picture that was not looked at yet: its name in messages, and either its path or its bytes."""

    name: str
    path: Path | None = None
    content: bytes | None = None


class Skip(NamedTuple):
    """What is left out of a record, and why."""

    reason: str
    detail: str = ""


class SourceRecord(NamedTuple):
    """One record of a source."""

    place: str
    """Where it stands, for people: `captions.jsonl:12`."""
    pictures: tuple[Picture, ...] = ()
    turns: tuple[Turn, ...] = ()
    skips: tuple[Skip, ...] = ()
    """With turns: captions that are left out of it. Without: why the record is."""
    annotations: Annotations | None = None


class Source(Protocol):
    """Where records come from. Reading it twice gives the same records in the same order."""

    kind: str
    name: str
    """Without the folder it is in."""

    def identity(self) -> str:
        """A hash of what decides the records, by which a second run knows the source again."""
        ...

    def records(self, start: int) -> Iterator[SourceRecord]:
        """All records from number `start` on. Raises UserError where nothing more can be read."""
        ...
