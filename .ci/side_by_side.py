"""Programs that take one core each, as many at a time as there are cores and at least two; what each said comes out
whole, in the order they were given."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor


def side_by_side(commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]) -> int:
    """Commands, and what each one's environment adds to this one's -> the worst exit status; a signal counts as 1."""
    worst = 0
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        for process in pool.map(_run, commands, environments):
            print(process.stdout, end="", flush=True)
            if process.returncode:
                print(
                    f"exit status {process.returncode}: {' '.join(process.args)}", file=sys.stderr, flush=True
                )
            worst = max(worst, process.returncode if process.returncode >= 0 else 1)
    return worst


def _run(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
