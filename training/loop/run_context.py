"""What all stages of a run share, and the files that say where it is: status.json and evaluations.jsonl."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from microvlm.atomic import write_file
from microvlm.formats import documents
from microvlm.training.loop.processes import Processes
from microvlm.training.loop.run_files import STATUS
from microvlm.training.time_to_score.score_target import ScoreTarget
from microvlm.training.watching.tracking import Tracking


@dataclass
class RunContext:
    """What all stages of a run share."""

    folder: Path
    log: Callable[[str], None]
    accelerator: Accelerator
    tracking: Tracking
    total_steps: int
    """Of all stages of this run."""
    first_step: int = 0
    """Steps of the stages before this one."""
    workers: int = 0
    target: ScoreTarget | None = None
    """The score that ends the last stage."""
    processes: Processes = field(default_factory=Processes)


def write_status(
    context: RunContext, state: str, step: int, reason: str = "", place: Mapping[str, Any] | None = None
) -> None:
    """Write a run's status.json: its state, the step over all stages, and why it ended."""
    document = {
        "state": state,
        **(place or {}),
        "step": step,
        "steps": context.total_steps,
        "reason": reason,
        "updated": round(time.time(), 1),
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }
    write_file(context.folder / STATUS, json.dumps(document) + "\n")


def cut_evaluations(path: Path, step: int, stage: str, done: int) -> None:
    """Drop the evaluations after `step`, which a resumed run makes again; all of a stage with `done` 0 steps."""
    try:
        lines = documents.read_file(path).splitlines(keepends=True)
    except FileNotFoundError:
        return
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if done == 0:
        kept = [line for line in kept if json.loads(line).get("stage") != stage]
    if len(kept) < len(lines):
        write_file(path, b"".join(kept).decode())


def _step_of(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**60
