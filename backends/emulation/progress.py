"""Progress of a long build on stderr: a bar on a terminal, one line for each step in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable

from microvlm.console import end_live_line, note

Progress = Callable[[str, float], None]
"""Called with the step's name and the completed share of it, 0 to 1."""

BAR_CELLS = 30


class StderrProgress:
    """Reports progress on stderr."""

    def __init__(self) -> None:
        self._step = ""

    def __call__(self, step: str, share: float) -> None:
        if sys.stderr.isatty():
            end_live_line()
            cells = round(BAR_CELLS * share)
            end = "\n" if share >= 1 else ""
            sys.stderr.write(f"\r{step:<44} [{'#' * cells:<{BAR_CELLS}}] {100 * share:3.0f} %{end}")
            sys.stderr.flush()
        elif step != self._step:
            note(f"{step} ...")
        self._step = step
