"""The records of a gate file, and of the report of `microvlm-bench gate`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.records import Figure

Text = Annotated[str, Meta(min_length=1, max_length=300)]
Ratio = Annotated[float, Meta(gt=0, le=1e9)]
MOST_LIMITS = 1000


class Limit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A demand on one figure of a document; at least one of the last five."""

    metric: Text
    """See `metric_path`."""
    document: Text | None = None
    """File, relative to the gate file; None for the document of the command line. Of a store, its newest result."""
    kind: Text | None = None
    """Of a store: the newest result of this kind."""
    baseline: Text | None = None
    """File of the document that ratios are relative to; None for the gate file's own."""
    min: Figure | None = None
    max: Figure | None = None
    min_ratio: Ratio | None = None
    max_ratio: Ratio | None = None
    one_of: Annotated[list[Text], Meta(min_length=1, max_length=100)] | None = None
    """Words, of which the value must be one, such as verdicts."""

    def __post_init__(self) -> None:
        if all(bound is None for bound in (self.min, self.max, self.min_ratio, self.max_ratio, self.one_of)):
            raise ValueError("a limit needs one of min, max, min_ratio, max_ratio and one_of")


class GateFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole gate file, JSON or TOML."""

    limits: Annotated[list[Limit], Meta(min_length=1, max_length=MOST_LIMITS)]
    baseline: Text | None = None


class CheckedLimit(msgspec.Struct, frozen=True):
    """One limit held against its document."""

    document: str
    metric: str
    value: Figure | str | None
    """None where the document does not hold it."""
    demanded: str
    met: bool
    sentence: str


class GateReport(msgspec.Struct, frozen=True):
    """The whole document."""

    gate: str
    met: bool
    limits: Annotated[list[CheckedLimit], Meta(max_length=MOST_LIMITS)]
