"""The names of the classes that the packaged encoders were trained to tell."""

from __future__ import annotations

from importlib import resources
from typing import Annotated

import msgspec
from msgspec import Meta


class _Class(msgspec.Struct, frozen=True):
    wnid: str
    name: str
    synonyms: list[str]


class _Classes(msgspec.Struct, frozen=True):
    source: str
    classes: Annotated[list[_Class], Meta(min_length=1)]


def class_names() -> list[str]:
    """The names of the encoder's 1,000 classes, in its order. A few classes share one."""
    text = resources.files(__package__).joinpath("imagenet_names.json").read_bytes()
    return [row.name for row in msgspec.json.decode(text, type=_Classes).classes]
