"""`microvlm-bench train`: training steps of several variants in turns, phase by phase, each variant in a process.

Imports nothing of `training`: its worker is a program, as a backend's is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from microvlm.bench.provenance import provenance, recorded_name
from microvlm.bench.records import Figure
from microvlm.bench.speed.harness import WorkerFailed, WorkerProcess
from microvlm.bench.stats import median, ratio_of_medians, summarise
from microvlm.bench.training.step_variants import BASE, PHASES, VARIANTS
from microvlm.errors import UserError
from microvlm.formats.documents import Count

WORKER = [sys.executable, "-P", "-m", "microvlm.training.step_costs.step_worker"]
BAR = 0.8
"""The least throughput of ternary training, as a share of float32's, at LEAST_TOKENS or more a step."""
LEAST_TOKENS = 512
GENERATED = "generated"


@dataclass(frozen=True)
class StepPlan:
    """What is measured: model, data (None for drawn pictures), size of a step, device, variants, numbers of steps."""

    model: str
    data: str | None = None
    variants: Sequence[str] = tuple(VARIANTS)
    tokens: int = LEAST_TOKENS
    batch_size: int | None = None
    device: str = "cpu"
    threads: int | None = None
    warmup: int = 1
    repeats: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown:
            raise UserError(f"unknown variant '{unknown[0]}'; choose of {', '.join(VARIANTS)}.")


class _Loaded(msgspec.Struct, frozen=True):
    batch_size: Count
    parameters: Count
    trained_parameters: Count
    threads: Count
    device_name: str | None = None


class _Step(msgspec.Struct, frozen=True):
    ms: dict[str, Figure]
    cpu_ms: Figure
    images: Count
    samples: Count
    tokens: Count
    answer_tokens: Count
    loss: Figure


class _Peak(msgspec.Struct, frozen=True):
    flops_per_s: Figure


class _Memory(msgspec.Struct, frozen=True):
    weights_bytes: Count
    gradients_bytes: Count
    optimizer_bytes: Count
    activations_bytes: Count
    peak_bytes: Count | None
    flops: Count
    tokens: Count


@dataclass
class VariantRun:
    """Raw timings of one variant."""

    name: str
    status: str = "ok"
    reason: str | None = None
    loaded: _Loaded | None = None
    steps: list[_Step] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    memory: _Memory | None = None

    @property
    def total_ms(self) -> list[float]:
        return [sum(step.ms.values()) for step in self.steps]


def run(plan: StepPlan, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The document of a measurement. Raises UserError where no variant can run."""
    runs = measure(plan, progress)
    finished = [one for one in runs if one.status == "ok"]
    if not finished:
        raise UserError(f"no variant could train: {runs[0].name}: {(runs[0].reason or '').rstrip('.')}.")
    first = finished[0]
    assert first.loaded is not None
    table = ratios(finished)
    tokens = round(median([step.tokens for step in first.steps]))
    return {
        "report": "train",
        "workload": {
            "model": recorded_name(plan.model),
            "data": GENERATED if plan.data is None else recorded_name(plan.data),
            "device": plan.device,
            "device_name": first.loaded.device_name,
            "threads": first.loaded.threads,
            "batch_size": first.loaded.batch_size,
            "images": round(median([step.images for step in first.steps])),
            "tokens": tokens,
            "answer_tokens": round(median([step.answer_tokens for step in first.steps])),
            "parameters": first.loaded.parameters,
            "trained_parameters": first.loaded.trained_parameters,
            "warmup": plan.warmup,
            "repeats": plan.repeats,
        },
        "variants": [result(one, peak_of(one, finished)) for one in runs],
        "ratios": table,
        "bars": bars(table, tokens),
        "provenance": provenance({}, first.loaded.threads),
    }


def measure(plan: StepPlan, progress: Callable[[str], None]) -> list[VariantRun]:
    """Every variant's steps, one of each in turn, so that a drift of the machine hits all alike."""
    runs = [VariantRun(name) for name in plan.variants]
    workers: dict[str, WorkerProcess] = {}
    try:
        for one in runs:
            progress(f"{one.name}: building the model")
            workers[one.name] = WorkerProcess(WORKER)
            one.loaded = _ask(one, workers, _Loaded, do="load", variant=one.name, **_request(plan))
        for index in range(plan.warmup + plan.repeats):
            progress(f"step {index + 1} of {plan.warmup + plan.repeats}")
            for one in runs:
                step = _ask(one, workers, _Step, do="step", index=index)
                peak = _ask(one, workers, _Peak, do="peak")
                if step is not None and peak is not None and index >= plan.warmup:
                    one.steps.append(step)
                    one.peaks.append(peak.flops_per_s)
        progress("counting bytes and operations")
        for one in runs:
            one.memory = _ask(one, workers, _Memory, do="memory", index=plan.warmup + plan.repeats)
    finally:
        for worker in workers.values():
            worker.close()
    return runs


def _request(plan: StepPlan) -> dict[str, Any]:
    names = ("model", "data", "tokens", "batch_size", "device", "threads", "seed")
    return {name: getattr(plan, name) for name in names}


def _ask(one: VariantRun, workers: dict[str, WorkerProcess], kind: type[Any], **request: Any) -> Any:
    """The answer, or None for a variant that has stopped; one that stops here gets its status and reason."""
    if one.status != "ok":
        return None
    try:
        return workers[one.name].ask(kind, **request)
    except WorkerFailed as failure:
        one.status, one.reason = ("skipped" if failure.mendable else "failed"), str(failure)
        return None


def peak_of(one: VariantRun, runs: Sequence[VariantRun]) -> float:
    """Operations a second of the fastest matrix product of a variant's precision, whichever process computed it."""
    precision = VARIANTS[one.name].mixed_precision
    same = (each for each in runs if VARIANTS[each.name].mixed_precision == precision)
    return max((peak for each in same for peak in each.peaks), default=0.0)


def result(one: VariantRun, peak: float) -> dict[str, Any]:
    """The report's entry of a variant; `peak` is that of `peak_of`.

    MFU (Chowdhery et al. 2022, arXiv 2204.02311): counted operations of forward and backward over the median step,
    divided by the fastest matrix product.
    """
    if one.status != "ok" or one.memory is None:
        return {"name": one.name, "status": one.status, "reason": one.reason}
    seconds = median(one.total_ms) / 1e3
    # A step's operations grow with its positions, which differ a little from batch to batch.
    tokens = median([step.tokens for step in one.steps])
    flops = one.memory.flops * tokens / one.memory.tokens
    memory = msgspec.structs.asdict(one.memory)
    return {
        "name": one.name,
        "status": one.status,
        "reason": None,
        "phases": {phase: summarise([step.ms[phase] for step in one.steps]) for phase in PHASES},
        "total": summarise(one.total_ms),
        "cpu_total": summarise([step.cpu_ms for step in one.steps]),
        "images_per_s": round(median([step.images for step in one.steps]) / seconds, 3),
        "tokens_per_s": round(tokens / seconds, 2),
        "memory": {name: value for name, value in memory.items() if name.endswith("_bytes")},
        "flops_per_step": round(flops),
        "peak_flops_per_s": round(peak),
        "mfu": round(flops / seconds / peak, 4),
    }


def ratios(runs: Sequence[VariantRun]) -> list[dict[str, Any]]:
    """Throughput of every variant over the base's, by wall clock and by processor time."""
    base = next((one for one in runs if one.name == BASE), None)
    if base is None:
        return []
    table = []
    for one in runs:
        if one is base or len(one.steps) != len(base.steps):
            continue
        times = {
            "wall": (base.total_ms, one.total_ms),
            "cpu": ([step.cpu_ms for step in base.steps], [step.cpu_ms for step in one.steps]),
        }
        for clock, (slow, own) in times.items():
            interval = ratio_of_medians(slow, own)
            figures = {name: round(value, 4) for name, value in interval._asdict().items()}
            table.append({"variant": one.name, "against": BASE, "clock": clock, **figures})
    return table


def bars(table: Sequence[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """The demand on ternary training, by both clocks; `met` is None for a step of fewer tokens than it is about."""
    return [
        {
            "name": f"throughput of qat over {BASE} by {row['clock']} clock, {LEAST_TOKENS} tokens a step or more",
            "value": row["value"],
            "met": row["value"] >= BAR if tokens >= LEAST_TOKENS else None,
            "at_least": BAR,
        }
        for row in table
        if row["variant"] == "qat"
    ]
