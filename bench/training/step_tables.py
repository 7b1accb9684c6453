"""Tables of a report of `microvlm-bench train`."""

from __future__ import annotations

from microvlm.bench.tables import Report, Table
from microvlm.bench.training.step_records import StepReport, VariantResult
from microvlm.bench.training.step_variants import PHASES, VARIANTS

_PHASE_WORDS = {
    "data": "data: drawing and collating a batch",
    "vision": "vision encoder",
    "forward": "forward, the rest",
    "backward": "backward",
    "step": "step: clipping and optimiser",
}
_MEMORY_WORDS = {
    "weights_bytes": "weights",
    "gradients_bytes": "gradients",
    "activations_bytes": "activations kept for the backward pass",
    "optimizer_bytes": "optimiser's states",
    "peak_bytes": "peak of the process",
}


def report(document: StepReport) -> Report:
    done = [variant for variant in document.variants if variant.total is not None]
    tables = [
        Table("phases", "milliseconds of a step, medians", _phases(done)),
        Table("speed", "speed", _speed(done)),
        Table("memory", "megabytes of a step", _memory(done)),
    ]
    if document.ratios:
        tables.append(Table("ratios", "throughput", _ratios(document)))
    if document.bars:
        tables.append(Table("bars", "what is demanded", _bars(document)))
    work = document.workload
    head = (
        f"training steps of {work.model} on {work.device_name or work.device}: "
        f"{work.images} pictures and {work.tokens} tokens a step"
    )
    remarks = [
        f"{work.parameters:,} parameters, {work.trained_parameters:,} of them learn; batches of {work.batch_size} "
        f"samples of data '{work.data}'; weights are random, which take as long as trained ones",
        f"{work.repeats} steps of each variant in turns after {work.warmup} to warm up; tokens are positions through "
        f"the decoder, {work.answer_tokens} of them answers",
        "weights, gradients, activations and the optimiser's states are bytes of live tensors, counted in a step; the "
        "peak is measured, and includes libraries",
        "MFU: operations of the matrix products of forward and backward, counted by torch's FlopCounterMode (a "
        "multiply-add is two), over a step's time and the fastest matrix product of the same precision in the same run",
        *(f"{v.name}: {VARIANTS[v.name].meaning}" for v in done if v.name in VARIANTS),
        *(f"{v.name}: {v.status}: {v.reason}" for v in document.variants if v.total is None),
    ]
    return Report(head, tables, remarks)


def _phases(variants: list[VariantResult]) -> list[list[str]]:
    rows = [["phase", *(v.name for v in variants)]]
    for phase in PHASES:
        cells = [v.phases.get(phase) for v in variants]
        rows.append(
            [_PHASE_WORDS[phase], *("" if cell is None else f"{cell.median_ms:.1f}" for cell in cells)]
        )
    rows.append(["the whole step", *(f"{v.total.median_ms:.1f}" if v.total else "" for v in variants)])
    rows.append(["its fastest", *(f"{v.total.min_ms:.1f}" if v.total else "" for v in variants)])
    cells = [v.cpu_total for v in variants]
    rows.append(["its processor time", *("" if cell is None else f"{cell.median_ms:.1f}" for cell in cells)])
    return rows


def _speed(variants: list[VariantResult]) -> list[list[str]]:
    return [
        ["", *(v.name for v in variants)],
        ["pictures a second", *(_figure(v.images_per_s, 2) for v in variants)],
        ["tokens a second", *(_figure(v.tokens_per_s, 1) for v in variants)],
        ["counted GFLOP a step", *(_figure(v.flops_per_step, 1, 1e9) for v in variants)],
        ["measured peak, GFLOP/s", *(_figure(v.peak_flops_per_s, 1, 1e9) for v in variants)],
        ["MFU", *(_figure(v.mfu, 3) for v in variants)],
    ]


def _memory(variants: list[VariantResult]) -> list[list[str]]:
    rows = [["", *(v.name for v in variants)]]
    for name, words in _MEMORY_WORDS.items():
        values = [None if v.memory is None else getattr(v.memory, name) for v in variants]
        rows.append([words, *(_figure(value, 1, 1e6) for value in values)])
    return rows


def _ratios(document: StepReport) -> list[list[str]]:
    rows = [["variant", "against", "clock", "throughput", "95 % interval"]]
    for ratio in document.ratios:
        interval = f"[{ratio.low:.3f}, {ratio.high:.3f}]"
        rows.append([ratio.variant, ratio.against, ratio.clock, f"{ratio.value:.3f}", interval])
    return rows


def _bars(document: StepReport) -> list[list[str]]:
    rows = [["", "demanded", "measured", "met"]]
    for bar in document.bars:
        met = "not asked of so small a step" if bar.met is None else "yes" if bar.met else "no"
        rows.append(
            [bar.name, f"at least {bar.at_least}", "" if bar.value is None else f"{bar.value:.3f}", met]
        )
    return rows


def _figure(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:,.{digits}f}"
