"""The records of a report about a training run (`summary.json` in its folder)."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.records import Figure, Provenance
from microvlm.formats.documents import Count


class Evaluated(msgspec.Struct, frozen=True, kw_only=True):
    """One evaluation on the way: after how much training, and its figures by their names in evaluations.jsonl."""

    step: Count
    tokens: Figure
    """That counted in the loss, up to here."""
    seconds: Figure
    """Of steps, up to here."""
    figures: dict[str, Figure]


class StageSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One stage: its length, its time, its losses, and the evaluations before and after it."""

    name: str
    steps: Count
    batch_size: Count
    decoder_bits: Figure
    trainable_params: Count
    total_params: Count
    seconds: Figure
    """Of its steps alone: evaluations, states and pictures are not counted."""
    samples: Count
    samples_per_second: Figure
    tokens_per_second: Figure
    loss_first: Figure
    """Mean cross-entropy of answers over the first logged steps, nats a token."""
    loss_last: Figure
    before: dict[str, Figure] = {}
    after: dict[str, Figure] = {}
    curve: list[Evaluated] = []
    """All evaluations, in their order; empty in reports of older versions."""
    processes: Count = 1
    sharding: str = ""
    """`DDP`, `FSDP2`, or `none` of one process; empty in reports of older versions."""
    device: str = ""
    step_peak_bytes: list[Count] = []
    """Of each process, within steps: on a GPU what PyTorch allocates, else the resident set."""


class TrainingReport(msgspec.Struct, frozen=True, kw_only=True):
    """A finished run."""

    report: str
    recipe: str
    model: str
    data: str
    samples: Count | None
    """Training samples of the data; null where it has no passes."""
    stages: list[StageSummary]
    wall_seconds: Figure
    """From the first logged step to the last, evaluations and pictures included."""
    peak_rss_bytes: Count
    """Of the process that finished the run."""
    provenance: Provenance


class StageCosts(msgspec.Struct, frozen=True, kw_only=True):
    """What a stage is predicted to cost."""

    name: str
    samples_seen: Count
    trainable_params: Count
    predicted_flops_a_sample: Figure
    predicted_hours_low: Figure
    predicted_hours_high: Figure
    predicted_bytes: Figure


class Assumptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a prediction rests on."""

    prompt_tokens: Count
    answer_tokens: Count
    utilisation_low: Figure
    """Share of the peak that training reaches."""
    utilisation_high: Figure


class CostsReport(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted costs of a recipe on a machine; nothing in it is measured."""

    report: str
    recipe: str
    model: str
    machine: str
    samples: Count
    assumed: Assumptions
    stages: list[StageCosts]


class SeveralCosts(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted costs of several recipes."""

    report: str
    recipes: Annotated[list[CostsReport], Meta(min_length=1, max_length=100)]
