"""The records of a report of `microvlm-bench train`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.records import MOST_COLUMNS, Bar, Figure, Provenance
from microvlm.formats.documents import Count


class PhaseSummary(msgspec.Struct, frozen=True):
    """Milliseconds of a phase, or of a whole step, over the timed steps."""

    median_ms: Figure
    p90_ms: Figure
    min_ms: Figure
    repeats: Count


class StepMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one step: the first four are the bytes of live tensors, counted; the peak is the system's."""

    weights_bytes: Count
    gradients_bytes: Count
    activations_bytes: Count
    """What autograd keeps between forward and backward, parameters left out, each storage once."""
    optimizer_bytes: Count
    peak_bytes: Count | None
    """Of a process that trains this variant alone: its resident set, or what PyTorch took of a GPU's memory."""


class VariantResult(msgspec.Struct, frozen=True, kw_only=True):
    """One variant. `status` is `ok`, `skipped` (it cannot run here) or `failed`; then `reason` says why."""

    name: str
    status: str
    reason: str | None = None
    phases: dict[str, PhaseSummary] = {}
    total: PhaseSummary | None = None
    cpu_total: PhaseSummary | None = None
    """Milliseconds of processor time of all threads; other programs on the machine change it little."""
    images_per_s: Figure | None = None
    tokens_per_s: Figure | None = None
    memory: StepMemory | None = None
    flops_per_step: Figure | None = None
    """Counted operations of the matrix products of forward and backward, a multiply-add as two."""
    peak_flops_per_s: Figure | None = None
    """Measured: the fastest matrix product at this precision in this run."""
    mfu: Figure | None = None


class StepRatio(msgspec.Struct, frozen=True):
    """Throughput of a variant over that of the base, steps resampled in pairs."""

    variant: str
    against: str
    clock: str
    """`wall`, or `cpu` for processor time."""
    value: Figure
    low: Figure
    high: Figure


class StepWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """What a step trains on."""

    model: str
    data: str
    device: str
    device_name: str | None = None
    threads: Count
    batch_size: Count
    images: Count
    tokens: Count
    """Positions through the decoder in a step: prefixes, prompts and answers; the median."""
    answer_tokens: Count
    parameters: Count
    trained_parameters: Count
    warmup: Count
    repeats: Count


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """Training steps of several variants, in turns."""

    report: str
    workload: StepWorkload
    variants: Annotated[list[VariantResult], Meta(min_length=1, max_length=MOST_COLUMNS)]
    ratios: list[StepRatio]
    bars: list[Bar]
    provenance: Provenance
