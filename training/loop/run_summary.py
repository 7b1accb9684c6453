"""The report of a finished run, made from its own files: lengths, speeds, losses, evaluations before and after."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from microvlm.bench.provenance import provenance
from microvlm.formats import documents
from microvlm.training.loop.run_files import DEVICES, EVALUATIONS, METRICS
from microvlm.training.loop.step_metrics import StepMemory
from microvlm.training.recipe import StageConfig
from microvlm.training.watching import names
from microvlm.training.watching.metrics_file import read_rows

_FIRST = 0.1
"""Share of a stage's logged lines that `loss_first` and `loss_last` average."""

Row = dict[str, Any]


def summarize(
    run: Path, recipe: str, of_stages: Sequence[StageConfig], model: str, data: str, samples: int | None
) -> dict[str, Any]:
    """The document of a finished run of these stages, of kind `training`. Raises UserError for damaged files."""
    rows = [dict(row) for row in read_rows(run / METRICS)]
    evaluations = read_evaluations(run)
    stages, first = [], 0
    for stage in of_stages:
        own = [row for row in rows if first < row["step"] <= first + stage.steps and is_logged(row)]
        sizes = next((row for row in rows if row["step"] == first and names.TOTAL_PARAMS in row), {})
        if own:
            of_stage = [e for e in evaluations if e["stage"] == stage.name]
            stages.append(_stage(stage, own, sizes, of_stage) | _devices(run / stage.name / DEVICES))
        first += stage.steps
    times = [row["time"] for row in rows if isinstance(row.get("time"), int | float)]
    return {
        "report": "training",
        "recipe": recipe,
        "model": model,
        "data": data,
        "samples": samples,
        "stages": stages,
        "wall_seconds": round(max(times) - min(times), 1) if times else 0.0,
        "peak_rss_bytes": peak_rss_bytes(),
        "provenance": provenance({}, None),
    }


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = peak if sys.platform == "darwin" else 1024 * peak
    return max(peak, StepMemory.largest[False])


def peak_gpu_bytes() -> int:
    """The most that PyTorch has allocated of the GPU's memory so far."""
    return max(torch.cuda.max_memory_allocated(), StepMemory.largest[True])


def _stage(stage: StageConfig, rows: list[Row], sizes: Row, evaluations: list[Row]) -> dict[str, Any]:
    previous, seconds, tokens = 0, 0.0, 0.0
    for row in rows:
        count = row[names.STAGE_STEP] - previous
        previous = row[names.STAGE_STEP]
        seconds += count * row[names.STEP_SECONDS]
        tokens += count * row[names.STEP_SECONDS] * row[names.TOKENS_PER_SECOND]
    part = max(1, round(_FIRST * len(rows)))
    key = names.LM_LOSS if names.LM_LOSS in rows[0] else names.LOSS
    samples = previous * stage.batch_size
    seconds = max(seconds, 1e-9)
    return {
        "name": stage.name,
        "steps": previous,
        "batch_size": stage.batch_size,
        "decoder_bits": stage.decoder_bits,
        "trainable_params": int(sizes.get(names.TRAINABLE_PARAMS, 0)),
        "total_params": int(sizes.get(names.TOTAL_PARAMS, 0)),
        "seconds": round(seconds, 2),
        "samples": samples,
        "samples_per_second": round(samples / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 2),
        "loss_first": round(sum(row[key] for row in rows[:part]) / part, 4),
        "loss_last": round(sum(row[key] for row in rows[-part:]) / part, 4),
        "before": _figures(evaluations[0]) if evaluations else {},
        "after": _figures(evaluations[-1]) if evaluations else {},
        "curve": _curve(rows, evaluations),
    }


def _curve(rows: list[Row], evaluations: list[Row]) -> list[dict[str, Any]]:
    """Each evaluation with the tokens and seconds of the steps before it, by the speed of the logged lines."""
    points = []
    for evaluation in evaluations:
        step = int(evaluation.get("stage_step", 0))
        previous, tokens, seconds = 0, 0.0, 0.0
        for row in rows:
            # Of a line that is logged after the evaluation, the steps before it.
            reached = min(row[names.STAGE_STEP], step)
            if reached <= previous:
                break
            spent = (reached - previous) * row[names.STEP_SECONDS]
            previous, seconds = reached, seconds + spent
            tokens += spent * row[names.TOKENS_PER_SECOND]
        figures = {
            name: value for name, value in _figures(evaluation).items() if name.startswith("evaluation/")
        }
        points.append(
            {"step": step, "tokens": round(tokens), "seconds": round(seconds, 1), "figures": figures}
        )
    return points


def _devices(path: Path) -> dict[str, Any]:
    """How a stage was trained; nothing of a run that an older version began."""
    return documents.load(path, dict[str, Any], "delete it") if path.is_file() else {}


def is_logged(row: Row) -> bool:
    """Whether a line of metrics.jsonl is one of steps, with their speed."""
    wanted = (names.LOSS, names.STAGE_STEP, names.STEP_SECONDS, names.TOKENS_PER_SECOND)
    return all(isinstance(row.get(name), int | float) for name in wanted)


def _figures(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if "/" in name and isinstance(value, int | float)}


def read_evaluations(run: Path) -> list[Row]:
    """The evaluations of a run, in their order; none where it made none."""
    try:
        lines = documents.read_file(run / EVALUATIONS).splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]
