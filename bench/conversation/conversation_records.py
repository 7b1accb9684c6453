"""The record of a report of `microvlm-bench conversation`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.records import Figure, ModelProvenance
from microvlm.formats.documents import Count


class Probe(msgspec.Struct, frozen=True):
    """The answer to the question for the first picture."""

    answer: str
    from_memory: bool
    scope: Figure


class Stage(msgspec.Struct, frozen=True):
    """The conversation after some of its turns, and the process."""

    turns: Count
    facts: Count
    states: Count
    rss_bytes: Count
    fact_bytes: Count
    """Keys, latents and texts of the rows, and the states."""
    descriptors: Count
    file_bytes: Count
    written_bytes_per_turn: Figure
    """Since the stage before, as is `ms_per_turn`."""
    ms_per_turn: Figure
    probe: Probe


class Limit(msgspec.Struct, frozen=True):
    """A demand on a measured value."""

    name: str
    value: Figure
    at_most: Figure
    met: bool


class ConversationReport(msgspec.Struct, frozen=True):
    """One conversation with one model on one backend."""

    provenance: ModelProvenance
    backend: str
    turns: Count
    stages: Annotated[list[Stage], Meta(min_length=1, max_length=1000)]
    load_s: Figure
    """Seconds in which the file is loaded afterwards."""
    probe_after_loading: Probe
    bars: list[Limit]
