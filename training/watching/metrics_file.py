"""metrics.jsonl: one JSON object a line, of a step's numbers. Reads it while another process writes it.

A line is {"step": 120, "time": 1769869501.2, "train/loss": 2.31, ...}. `step` counts optimiser steps over all stages
and `time` is in seconds since 1970. A number that is not finite is null, and the key "not_finite" says which:
{"train/loss": "nan"}. A line that is not complete (a killed writer's, or one that is being written) is left out.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from microvlm.atomic import write_file
from microvlm.errors import UserError
from microvlm.formats import documents

NOT_FINITE = "not_finite"
LARGEST_FILE = 1_000_000_000
"""Bytes of a metrics file that is read: more than a million lines."""

Row = dict[str, Any]


def metrics_line(step: int, values: Mapping[str, float]) -> str:
    """A line of the file, with its line feed."""
    numbers = {name: value if type(value) is int else float(value) for name, value in values.items()}
    row: Row = {"step": step, "time": round(time.time(), 3)}
    row |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    odd = {name: str(value) for name, value in numbers.items() if not math.isfinite(value)}
    return json.dumps(row | ({NOT_FINITE: odd} if odd else {}), allow_nan=False) + "\n"


def read_rows(path: Path) -> list[Row]:
    """The complete lines of a metrics file in their order; none of a file that does not exist.

    Raises UserError for a file that cannot be read or is larger than `LARGEST_FILE`.
    """
    return [row for row in map(parse_row, _content(path).split(b"\n")) if row is not None]


def parse_row(line: bytes) -> Row | None:
    """A line's object, or None for a line that is not one with a step."""
    try:
        row = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    step = row.get("step")
    return row if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def series(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the metric `name`, without the lines where it is absent or not finite."""
    steps, values = [], []
    for row in rows:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            steps.append(row["step"])
            values.append(float(value))
    return steps, values


def cut(path: Path, step: int) -> None:
    """Remove the lines beyond `step` and those that are not complete, in one atomic replacement.

    Raises UserError for a file that cannot be read or replaced.
    """
    content, kept = _content(path), []
    for line in content.split(b"\n"):
        row = parse_row(line)
        if row is not None and row["step"] <= step:
            kept.append(line + b"\n")
    if (cleaned := b"".join(kept)) != content:
        write_file(path, cleaned)


def _content(path: Path) -> bytes:
    try:
        with documents.open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_FILE:
                raise UserError(
                    f"{path} has more than {LARGEST_FILE:,} bytes: move its older lines elsewhere."
                )
            return file.read()
    except FileNotFoundError:
        return b""
