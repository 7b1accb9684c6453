"""A finished run's time to a score, read from the run's own files: what a leaderboard holds of it."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from microvlm.atomic import write_file
from microvlm.bench.provenance import provenance
from microvlm.bench.training.leaderboard_records import SCHEMA, Entry, Machine, Score, TrainedData
from microvlm.bench.training.leaderboard_tables import duration, machine_words
from microvlm.formats import documents
from microvlm.training.loop.run_files import METRICS, OUTCOME
from microvlm.training.loop.run_provenance import CODE_SHA256
from microvlm.training.loop.run_summary import is_logged, peak_gpu_bytes, peak_rss_bytes, read_evaluations
from microvlm.training.recipe import Recipe, StageConfig
from microvlm.training.run_checks import read_description
from microvlm.training.time_to_score.score_target import ScoreTarget
from microvlm.training.watching import names
from microvlm.training.watching.metrics_file import read_rows

Row = dict[str, Any]
_REMEDY = "delete the run's folder"


class _Length(NamedTuple):
    """What a run spent up to a step."""

    steps: int
    samples: int
    tokens: float
    seconds: float


def run_outcome(run: Path, target: ScoreTarget, price_per_hour: float | None) -> Entry:
    """The entry of the finished run in the folder `run`, which is kept in its outcome.json.

    A run that is asked again about the same score keeps its entry, with the peak memory of the process that trained,
    whatever the price. Raises UserError for damaged files.
    """
    path = run / OUTCOME
    if path.is_file():
        kept = documents.load(path, Entry, f"delete {path}")
        if (kept.score.name, kept.score.target) == (target.name, target.value):
            return _priced(kept, price_per_hour)
    entry = _priced(_measured(run, target), price_per_hour)
    write_file(path, msgspec.json.format(msgspec.json.encode(entry), indent=1) + b"\n")
    return entry


def _measured(run: Path, target: ScoreTarget) -> Entry:
    described = read_description(run) or {}
    asked = documents.convert(described.get("recipe"), Recipe, run, _REMEDY)
    resolved = documents.convert(described.get("resolved", described.get("recipe")), Recipe, run, _REMEDY)
    stages = _stages_run(resolved, described.get("start"))
    evaluations = read_evaluations(run)
    last = [
        row for row in evaluations if row.get("stage") == stages[-1].name and row.get("stage_step", 0) > 0
    ]
    found = next((row for row in last if target.is_met(row)), None)
    best = _best(last, target) if found is None else found
    end = math.inf if found is None else found["step"]
    length = _spent([dict(row) for row in read_rows(run / METRICS)], stages, end)
    facts = provenance({}, None)
    has_gpu = torch.cuda.is_available()
    content = {
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "recipe": asked.name,
        "recipe_sha256": _sha256(described["recipe"]),
        "budget": _budget_words(described.get("budget")),
        "start_sha256": (described.get("start") or {}).get("weights_sha256"),
        "data": documents.convert(described.get("data", []), list[TrainedData], run, _REMEDY),
        "seed": asked.seed,
        "decoder_bits": 32 if described.get("float_control") else stages[-1].decoder_bits,
        "commit": facts["commit"],
        "code_sha256": CODE_SHA256,
        "machine": Machine(
            cpu=facts["cpu"],
            cores=facts["cores"],
            gpu=torch.cuda.get_device_name() if has_gpu else None,
            memory_bytes=facts["memory_bytes"],
            os=facts["os"],
            python=facts["python"],
            versions=facts["versions"],
        ),
        "score": Score(
            name=target.name,
            target=target.value,
            higher_is_better=target.higher_is_better,
            value=None if best is None else best[target.metric],
            reached=found is not None,
        ),
        "training_seconds": round(length.seconds, 2),
        "evaluation_seconds": round(
            math.fsum(row.get("seconds", 0.0) for row in evaluations if row["step"] <= end), 2
        ),
        "steps": length.steps,
        "samples": length.samples,
        "tokens": round(length.tokens),
        "peak_memory_bytes": peak_gpu_bytes() if has_gpu else peak_rss_bytes(),
    }
    plain = msgspec.to_builtins(content)
    document = {"schema": SCHEMA, "run_id": _sha256(plain), **plain, "price_per_hour": None, "cost": None}
    return documents.convert(document, Entry, run, _REMEDY)


def _stages_run(recipe: Recipe, start: Row | None) -> Sequence[StageConfig]:
    """The stages that the run trains: a start may replace the first ones."""
    first = (start or {}).get("stage")
    skipped = next((i for i, stage in enumerate(recipe.stages) if stage.name == first), 0)
    return recipe.stages[skipped:]


def _best(rows: Sequence[Row], target: ScoreTarget) -> Row | None:
    """The evaluation nearest to the target; None where none has the score as a number."""
    numbers = [row for row in rows if isinstance(row.get(target.metric), int | float)]
    choose = max if target.higher_is_better else min
    return choose(numbers, key=lambda row: row[target.metric]) if numbers else None


def _spent(rows: Sequence[Row], stages: Sequence[StageConfig], end: float) -> _Length:
    """Steps, samples, tokens and seconds of steps up to step `end` of the run.

    Steps that a killed run lost and took again count once, as its metrics have them.
    """
    first, steps, samples, tokens, seconds = 0, 0, 0, 0.0, 0.0
    for stage in stages:
        previous = first
        for row in rows:
            if not (first < row["step"] <= first + stage.steps and is_logged(row)):
                continue
            count = max(0, min(row["step"], end) - previous)
            previous = row["step"]
            steps += int(count)
            samples += int(count) * stage.batch_size
            spent = count * row[names.STEP_SECONDS]
            seconds += spent
            tokens += spent * row[names.TOKENS_PER_SECOND]
        first += stage.steps
    return _Length(steps, samples, tokens, seconds)


def _priced(entry: Entry, price_per_hour: float | None) -> Entry:
    if price_per_hour is None:
        return entry
    hours = (entry.training_seconds + entry.evaluation_seconds) / 3600
    return msgspec.structs.replace(
        entry, price_per_hour=price_per_hour, cost=round(price_per_hour * hours, 6)
    )


def _budget_words(budget: Row | None) -> str | None:
    if budget is None:
        return None
    return f"{budget['steps']} steps" if budget.get("steps") else f"{budget['seconds']:g} s"


def _sha256(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def outcome_lines(entry: Entry, target: ScoreTarget) -> list[str]:
    """What a command prints about a run that was to reach a score."""
    score = entry.score
    if score.reached:
        head = f"reached {target} (with {score.value:.4g}) in {duration(entry.training_seconds)} of training"
    else:
        best = "no evaluation has it" if score.value is None else f"the best was {score.value:.4g}"
        head = f"did not reach {target}: {best}, after {duration(entry.training_seconds)} of training"
    lines = [
        f"{head}, and {duration(entry.evaluation_seconds)} of evaluations apart from it",
        f"{entry.steps:,} steps, {entry.samples:,} samples, {entry.tokens:,} tokens; "
        f"{entry.peak_memory_bytes / 1e9:.2f} GB at most; {machine_words(entry.machine)}",
    ]
    if entry.cost is not None:
        lines.append(f"cost {entry.cost:.4g}, at {entry.price_per_hour:g} an hour")
    return lines
