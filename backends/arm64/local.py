"""The worker as a child process on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from microvlm.backends.arm64.link import Started

WORKER = ("-m", "microvlm.backends.arm64.worker")


class LocalTransport:
    name = "local"

    def start(self, bundle: Path) -> Started:
        # A key press that interrupts this program is for it alone: it ends the worker itself.
        process = subprocess.Popen(
            [sys.executable, *WORKER],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            start_new_session=True,
        )
        return Started(process, str(bundle.resolve()))

    def explain(self, status: int, said: str) -> str:
        return f"the worker did not start (exit status {status}): {last_line(said)}."


def last_line(text: str) -> str:
    """Of what a program said, without its full stop."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "it said nothing"
