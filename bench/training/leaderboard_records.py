"""The records of a leaderboard: a run's time to a score, with everything that is needed to repeat it."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.records import Commit, Figure
from microvlm.formats.documents import Count, Sha256

SCHEMA = 1
MOST_ENTRIES = 100_000

Text = Annotated[str, Meta(max_length=500)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]


class Score(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was to be reached, and what the evaluation said that reached it, or the best one."""

    name: Text
    target: Figure
    higher_is_better: bool
    value: Figure | None
    """None where the run has no evaluation of its last stage."""
    reached: bool


class TrainedData(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A data folder of the run."""

    name: Text
    weight: Figure
    samples: Count
    sha256: Text
    """Of the file that describes the folder; empty for data of another kind."""


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the run ended."""

    cpu: Text
    cores: Count
    gpu: Text | None
    memory_bytes: Count | None
    os: Text
    python: Text
    versions: dict[Text, Text | None]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run: a line of a leaderboard file."""

    schema: Annotated[int, Meta(ge=1, le=SCHEMA)]
    run_id: Sha256
    """Of the other fields: the same run is added once."""
    date_utc: Text
    recipe: Text
    recipe_sha256: Sha256
    """Of the recipe as it was asked for, as JSON with sorted keys."""
    budget: Text | None
    start_sha256: Text | None
    """Of the weights that the run started from."""
    data: Annotated[list[TrainedData], Meta(max_length=100)]
    seed: Count
    decoder_bits: Figure
    """32, or 1.58: the score is a ternary model's."""
    commit: Commit | None
    code_sha256: Sha256
    machine: Machine
    score: Score
    training_seconds: Seconds
    """Of steps and of waiting for their batches, all stages, up to the evaluation that reached the score."""
    evaluation_seconds: Seconds
    steps: Count
    samples: Count
    tokens: Count
    """That count in the loss."""
    peak_memory_bytes: Count
    """Of the process, resident; with a GPU what PyTorch took of its memory."""
    price_per_hour: Figure | None
    cost: Figure | None
    """At that price, for training and evaluations."""


class Leaderboard(msgspec.Struct, frozen=True, kw_only=True):
    """A leaderboard file as a report."""

    report: str
    entries: Annotated[list[Entry], Meta(max_length=MOST_ENTRIES)]
