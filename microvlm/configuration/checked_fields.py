"""Fields of a configuration: the ranges of their values, and how a part checks itself when a program builds it."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta

from microvlm.errors import UserError
from microvlm.formats import documents

# Limits are far above every model that this package could run, and far below what would exhaust a machine in names,
# shapes and positions alone: a configuration is read before the weights that it must fit.
Width = Annotated[int, Meta(ge=1, le=262_144)]
Layers = Annotated[int, Meta(ge=1, le=1024)]
Heads = Annotated[int, Meta(ge=1, le=4096)]
Side = Annotated[int, Meta(ge=1, le=2048)]
Positions = Annotated[int, Meta(ge=1, le=2**24)]
Epsilon = Annotated[float, Meta(ge=1e-30, le=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Base = Annotated[float, Meta(ge=1, le=1e12)]
Variance = Annotated[float, Meta(ge=1e-12, le=1e6)]
Mean = Annotated[float, Meta(ge=-1e6, le=1e6)]
Deviation = Annotated[float, Meta(ge=1e-6, le=1e6)]
Bits = int | float
"""1.58, or a whole number, which is saved as one."""
Label = Annotated[str, Meta(max_length=200)]
Token = Annotated[str, Meta(min_length=1, max_length=200)]
Phrase = Annotated[str, Meta(max_length=20_000)]


class BadConfiguration(UserError, ValueError):
    """A value that a part of a configuration refuses. `args[0]` says what is wrong, without a full stop.

    As a ValueError it becomes a sentence with the file's and the part's name where a file is read.
    """

    def __str__(self) -> str:
        return f"bad configuration: {self.args[0]}."


def require(condition: bool, problem: str) -> None:
    if not condition:
        raise BadConfiguration(problem)


@cache
def _record_of(part: type) -> type[msgspec.Struct]:
    """A record with the fields of a dataclass, which checks their types and ranges and nothing else."""
    hints = get_type_hints(part, include_extras=True)
    return msgspec.defstruct(
        part.__name__, [(item.name, hints[item.name]) for item in dataclasses.fields(part)]
    )


def check_fields(part: Any) -> None:
    """Hold every field against its annotated type and range; a list becomes a tuple. Raises UserError.

    Reading a file has checked them before. A part that a program builds is checked here.
    """
    values = {item.name: _plain(getattr(part, item.name)) for item in dataclasses.fields(part)}
    kind: type = type(part)
    record = documents.convert(values, _record_of(kind), "bad configuration", "change it")
    for name in values:
        object.__setattr__(part, name, getattr(record, name))


def _plain(value: Any) -> Any:
    """The value with Python's own floats: numpy's are a kind of them that msgspec does not take."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return float(value) if isinstance(value, float) else value
