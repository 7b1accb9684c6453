"""Records that reports of every kind share: where and when a measurement was made, and of which model.

A report of one kind is a frozen record of its own (`*_records` beside its tables). Fields that no table shows are not
declared, so a newer version may add some.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.formats.documents import Count

MOST_COLUMNS = 64
"""Models or backends that stand side by side."""
_LARGEST = 1e18
Figure = Annotated[float, Meta(ge=-_LARGEST, le=_LARGEST)]
"""A measured or demanded value; a table can show it."""
Amount = Annotated[int, Meta(ge=-(2**53), le=2**53)] | Figure
"""A value that tables show as it was written: a whole number without decimals."""
PositiveFigure = Annotated[float, Meta(gt=0, le=_LARGEST)]
Interval = tuple[Figure, Figure]
"""Low and high end."""


class Estimate(msgspec.Struct, frozen=True):
    """A score, or a difference of scores, with its 95 % interval."""

    value: Figure
    low: Figure
    high: Figure

    @property
    def verdict(self) -> str:
        """Of a difference: an interval that contains 0 does not say which of the two is better."""
        return "undecided" if self.low <= 0 <= self.high else "decided"


class Commit(msgspec.Struct, frozen=True):
    """The commit of the code that measured; `changed`: whether files differed from it."""

    hash: str
    date: str
    changed: bool


class ModelFiles(msgspec.Struct, frozen=True):
    """A measured model, and the bytes of its files by name."""

    name: str
    total_bytes: Count = 0
    files: dict[str, Count] = {}


class Provenance(msgspec.Struct, frozen=True):
    """Machine, versions, commit and date of a measurement, as `provenance.provenance` writes them."""

    date_utc: str
    cpu: str
    versions: dict[str, str | None]
    """Package -> version."""
    commit: Commit | None = None
    cores: Count | None = None
    load_average: list[Figure] | None = None
    os: str | None = None
    python: str | None = None
    threads: Count | list[Count] | None = None


class ModelProvenance(Provenance, frozen=True, kw_only=True):
    """The provenance of a measurement of one model."""

    model: ModelFiles


class Bar(msgspec.Struct, frozen=True):
    """A demand on a value: one of `at_most` and `at_least`. `value` and `met` are None where nothing was measured."""

    name: str
    value: Amount | None
    met: bool | None
    at_most: Amount | None = None
    at_least: Amount | None = None

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("a bar needs one of at_most and at_least")
