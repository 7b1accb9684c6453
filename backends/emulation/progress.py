"""How a long build tells where it is: a bar on a terminal, one line a step in a log; always on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable

from microvlm.console import note

Progress = Callable[[str, float], None]
"""(step, share of it that is done, 0 to 1)."""

BAR_CELLS = 30


class StderrProgress:
    """The default reporter."""

    def __init__(self) -> None:
        self._step = ""

    def __call__(self, step: str, done: float) -> None:
        if sys.stderr.isatty():
            cells = round(BAR_CELLS * done)
            end = "\n" if done >= 1 else ""
            sys.stderr.write(f"\r{step:<44} [{'#' * cells:<{BAR_CELLS}}] {100 * done:3.0f} %{end}")
            sys.stderr.flush()
        elif step != self._step:
            note(f"{step} ...")
        self._step = step
