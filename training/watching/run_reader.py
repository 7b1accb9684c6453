"""Reads a run's folder while the run writes it: state, metrics, evaluations, pictures, captions, checkpoints.

What is not there yet, or is half written, is left out: nothing of a run in progress is an error.
"""

from __future__ import annotations

import itertools
import os
import socket
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Count
from microvlm.training.loop.run_files import (
    CHECKPOINT,
    EVALUATIONS,
    METRICS,
    PICTURES,
    RECIPE,
    RUN,
    SAMPLES,
    STATUS,
)
from microvlm.training.watching import names
from microvlm.training.watching.metrics_file import Row, read_rows, series

LARGEST_PICTURE = 5_000_000
"""Bytes of a picture that is shown."""
_SILENT_SECONDS = 120.0
"""A run that is silent for so long, and for 20 of its steps, is not said to be running."""
_RECENT = 30
"""Lines of metrics over which the speed is measured."""


class Status(msgspec.Struct, frozen=True):
    """status.json: where the run is."""

    state: str
    """running, stopped, finished or failed."""
    stage: str = ""
    stage_step: Count = 0
    stage_steps: Count = 0
    step: Count = 0
    steps: Count = 0
    reason: str = ""
    updated: float = 0.0
    """Seconds since 1970."""
    pid: Count | None = None
    host: str = ""


class Sample(msgspec.Struct, frozen=True):
    """A held-out picture and what the model said about it."""

    picture: str
    """Name of a file in the folder samples."""
    truth: str = ""
    answer: str = ""
    key: str = ""


@dataclass
class RunView:
    """What a run's folder holds at one moment."""

    folder: Path
    name: str
    state: str
    """running, stopped, finished, failed, silent (no sign of life) or new (nothing written yet)."""
    reason: str
    status: Status
    rows: list[Row]
    evaluations: list[Row]
    pictures: dict[str, list[Path]] = field(default_factory=dict)
    """Kind -> files, oldest first."""
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    """Step -> captions of the same pictures, the first and the last evaluation."""
    checkpoints: list[Path] = field(default_factory=list)

    @property
    def steps_per_second(self) -> float | None:
        """Median over the last lines of metrics, so that a pause of a resumed run does not count."""
        points = [
            (row["time"], row["step"])
            for row in self.rows[-_RECENT:]
            if isinstance(row.get("time"), int | float)
        ]
        speeds = [
            (after[1] - before[1]) / (after[0] - before[0])
            for before, after in itertools.pairwise(points)
            if after[0] > before[0] and after[1] > before[1]
        ]
        return statistics.median(speeds) if speeds else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last stage's last step, at the present speed; None for a run that is not running."""
        speed = self.steps_per_second
        if self.state != "running" or speed is None or not self.status.steps:
            return None
        return max(0, self.status.steps - self.status.step) / speed

    def last(self, name: str) -> float | None:
        """The last finite value of a metric."""
        values = series(self.rows, name)[1]
        return values[-1] if values else None


def read_run(folder: Path, now: float | None = None) -> RunView:
    """Read a run's folder. now : seconds since 1970, by default the present time.

    Raises UserError for a folder that holds no run.
    """
    known = (RUN, STATUS, RECIPE, METRICS)
    if not any((folder / name).exists() for name in known):
        problem = "holds no run" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} {problem}: give the folder that microvlm-train printed or got with -o.")
    status = _document(folder / STATUS, Status) or Status("new")
    rows = read_rows(folder / METRICS)
    view = RunView(
        folder,
        _name(folder),
        status.state if status.state != "new" or not rows else "silent",
        status.reason,
        status,
        rows,
        read_rows(folder / EVALUATIONS),
        _pictures(folder / PICTURES),
        _samples(folder / SAMPLES),
        _checkpoints(folder),
    )
    if view.state == "running":
        _doubt(view, time.time() if now is None else now)
    return view


def _doubt(view: RunView, now: float) -> None:
    """Say of a run whose process is gone, or that is silent for long, that it is not running."""
    status = view.status
    silent = now - status.updated
    speed = view.steps_per_second
    if status.pid is not None and status.host == socket.gethostname() and not _lives(status.pid):
        view.state, view.reason = "silent", f"its process {status.pid} is gone"
    elif silent > max(_SILENT_SECONDS, 20 / speed if speed else 0.0):
        view.state, view.reason = "silent", f"no sign of life for {silent / 60:.0f} minutes"


def _lives(pid: int) -> bool:
    if os.name == "nt":  # os.kill(pid, 0) would end it there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _name(folder: Path) -> str:
    run = _document(folder / RUN, dict[str, Any]) or {}
    name = run.get("name", run.get("run_name"))
    return name if isinstance(name, str) and name else folder.resolve().name


def _document(path: Path, kind: Any) -> Any:
    """A small JSON file's content, or None if it is missing or not right."""
    try:
        return documents.load(path, kind, "", 1_000_000)
    except (FileNotFoundError, UserError):
        return None


def _pictures(folder: Path) -> dict[str, list[Path]]:
    """Pictures by the first word of their names, which end in a step: attention-00000120.png."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else []:
        kinds.setdefault(path.stem.partition("-")[0], []).append(path)
    return kinds


def _samples(folder: Path) -> dict[int, list[Sample]]:
    """The captions of the first and of the last evaluation that can be read."""
    files = sorted(path for path in folder.glob("*.json") if path.stem.isdecimal()) if folder.is_dir() else []
    found: dict[int, list[Sample]] = {}
    for path in files[:1] + files[:0:-1]:
        samples = _document(path, list[Sample])
        if samples:
            found[int(path.stem)] = samples
        if len(found) == 2:
            break
    return dict(sorted(found.items()))


def _checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoint, then those of its stages."""
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    candidates = [folder / CHECKPOINT, *inner, *(path / CHECKPOINT for path in inner)]
    return [path for path in dict.fromkeys(candidates) if (path / "config.json").is_file()]


def summary(view: RunView) -> list[str]:
    """A few lines about the run for a terminal."""
    from microvlm.training.watching.progress import duration

    status = view.status
    place = f", stage {status.stage} {status.stage_step}/{status.stage_steps}" if status.stage else ""
    total = f" (step {status.step} of {status.steps})" if status.steps else ""
    lines = [f"{view.name}: {view.state}{place}{total}" + (f": {view.reason}" if view.reason else "")]
    facts = [
        f"{word} {value:.4g}"
        for word, value in (("loss", view.last(names.LOSS)), ("lm_loss", view.last(names.LM_LOSS)))
        if value is not None
    ]
    for name, unit in ((names.SAMPLES_PER_SECOND, "samples/s"), (names.TOKENS_PER_SECOND, "tokens/s")):
        value = view.last(name)
        facts += [f"{value:.3g} {unit}"] if value is not None and view.state == "running" else []
    left = view.seconds_left
    lines += ["  ".join([*facts, *([f"{duration(left)} left"] if left is not None else [])])] if facts else []
    if view.evaluations:
        row = view.evaluations[-1]
        values = [f"{k.removeprefix('evaluation/')} {v:.4g}" for k, v in numbers(row).items()]
        lines.append(f"evaluation at step {row['step']}: {'  '.join(values)}")
    lines += [f"checkpoint: {path}" for path in view.checkpoints[:1]]
    return lines


def numbers(row: Row) -> dict[str, float]:
    """The measured numbers of a line."""
    return {
        key: value
        for key, value in row.items()
        if "/" in key and isinstance(value, int | float) and not isinstance(value, bool)
    }
