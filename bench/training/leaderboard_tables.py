"""A leaderboard as a table, the fastest run first."""

from __future__ import annotations

from microvlm.bench.tables import Report, Table
from microvlm.bench.training.leaderboard_records import Entry, Leaderboard, Machine, Score

_HEAD = [
    "score",
    "training",
    "evaluation",
    "reached",
    "recipe",
    "decoder bits",
    "data",
    "seed",
    "steps",
    "samples",
    "tokens",
    "cost",
    "peak GB",
    "machine",
    "commit",
    "date",
]


def report(document: Leaderboard) -> Report:
    """Runs by the score that they were to reach, and by time: times to different scores cannot be compared."""
    entries = sorted(document.entries, key=_order)
    remarks = [
        "training is the time of steps and of waiting for their batches; states, pictures and evaluations are not in it"
    ]
    tables = [Table("leaderboard", "time to a score", [_HEAD, *map(_row, entries)])] if entries else []
    return Report(f"leaderboard of {len(entries)} runs", tables, remarks)


def _order(entry: Entry) -> tuple[str, float, float]:
    return entry.score.name, entry.score.target, entry.training_seconds


def _row(entry: Entry) -> list[str]:
    value = entry.score.value
    commit = entry.commit
    return [
        score_words(entry.score),
        duration(entry.training_seconds),
        duration(entry.evaluation_seconds),
        "" if value is None else f"{value:.4g}",
        entry.recipe,
        f"{entry.decoder_bits:g}",
        ", ".join(source.name for source in entry.data),
        str(entry.seed),
        f"{entry.steps:,}",
        f"{entry.samples:,}",
        f"{entry.tokens:,}",
        "" if entry.cost is None else f"{entry.cost:.4g}",
        f"{entry.peak_memory_bytes / 1e9:.2f}",
        machine_words(entry.machine),
        "" if commit is None else commit.hash[:10] + ("+" if commit.changed else ""),
        entry.date_utc[:10],
    ]


def score_words(score: Score) -> str:
    """`loss <= 2.5`, `token_accuracy >= 0.6`."""
    return f"{score.name} {'>=' if score.higher_is_better else '<='} {score.target:g}"


def machine_words(machine: Machine) -> str:
    return machine.gpu or f"{machine.cpu}, {machine.cores} cores"


def duration(seconds: float) -> str:
    """`12.3s`, `4m05s`, `2h07m`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
