"""Names of runs: `run_{counter}_{config}_{timestamp}`, where the counter goes up over the runs of one folder."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

_NAME = re.compile(r"run_(\d{1,9})_")
_LONGEST_CONFIG = 40


def next_run_name(parent: Path, config: str, now: datetime) -> str:
    """Name of the next run in the folder `parent`, such as `run_3_stage1_20260131_142501`.

    The counter is one more than the highest among the names in `parent`, which need not exist. config : what is run;
    characters that are not safe in a file name become hyphens. now : local time.
    """
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    counters = [int(match[1]) for match in map(_NAME.match, names) if match]
    words = re.sub(r"[^A-Za-z0-9.]+", "-", config).strip("-.")[:_LONGEST_CONFIG].rstrip("-.") or "run"
    return f"run_{max(counters, default=0) + 1}_{words}_{now:%Y%m%d_%H%M%S}"
