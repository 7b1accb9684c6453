"""Progress of a run: a bar on a terminal, and lines with the same facts elsewhere (a file, a pipe, a service's log)."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from microvlm.console import end_live_line, note

_WINDOW = 32
"""Updates over which speeds are measured."""


class Progress:
    """Shows how far a run is: steps, loss, samples/s, tokens/s and the time left. A context manager.

    total_steps, start : steps of the run, and how many of them are done. every : without a terminal, a line is printed
    when a multiple of this many steps is reached, and at the end. name : what is counted, such as the stage. terminal :
    draw a bar; by default where stderr is a terminal. log, clock : where lines go, and the time in seconds.

    A speed is that of the last 32 updates; the time left assumes that the last steps' speed stays.
    """

    def __init__(
        self,
        total_steps: int,
        start: int = 0,
        *,
        every: int = 10,
        name: str = "",
        terminal: bool | None = None,
        log: Callable[[str], None] = note,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps, self.step, self.every, self.name = total_steps, start, max(1, every), name
        self._log, self._clock, self._first = log, clock, start
        self._loss: float | None = None
        # (time, step, samples so far, tokens so far)
        self._marks: deque[tuple[float, int, int, int]] = deque(maxlen=_WINDOW + 1)
        self._marks.append((clock(), start, 0, 0))
        self._bar = None
        if sys.stderr.isatty() if terminal is None else terminal:
            from tqdm import tqdm

            end_live_line()
            # Some pseudo-terminals say that they have no columns and lines: tqdm would draw nothing.
            fixed = not _columns()
            self._bar = tqdm(
                total=total_steps,
                initial=start,
                desc=name or None,
                ncols=100 if fixed else None,
                nrows=20 if fixed else None,
                dynamic_ncols=not fixed,
                unit="step",
            )

    def update(self, step: int, loss: float | None = None, samples: int = 0, tokens: int = 0) -> None:
        """Step `step` (counted from 1) is done. samples, tokens : how many since the last update, over all processes.

        loss : in nats; None keeps the last one, so that a device need not wait for every step's.
        """
        before, self.step = self.step, step
        self._loss = self._loss if loss is None else loss
        _, _, all_samples, all_tokens = self._marks[-1]
        self._marks.append((self._clock(), step, all_samples + samples, all_tokens + tokens))
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(self._facts()), refresh=False)
            self._bar.update(step - before)
        elif step // self.every > before // self.every or step == self.total_steps or before == self._first:
            left = self.seconds_left
            facts = [*self._facts(), *([f"{duration(left)} left"] if left is not None and left > 0 else [])]
            self._log("  ".join([f"{self.name} {step}/{self.total_steps}".strip(), *facts]))

    @property
    def samples_per_second(self) -> float:
        """Samples per second of the last updates; 0 before the first."""
        return self._speed(2)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the last updates; 0 before the first."""
        return self._speed(3)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last step at the speed of the last updates; None before the first."""
        speed = self._speed(1)
        return (self.total_steps - self.step) / speed if speed > 0 else None

    def message(self, text: str) -> None:
        """Print a line without spoiling the bar."""
        if self._bar is None:
            self._log(text)
        else:
            self._bar.clear()
            self._log(text)
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _speed(self, column: int) -> float:
        first, last = self._marks[0], self._marks[-1]
        seconds = last[0] - first[0]
        return (last[column] - first[column]) / seconds if seconds > 0 else 0.0

    def _facts(self) -> list[str]:
        facts = [] if self._loss is None else [f"loss {self._loss:.4g}"]
        for speed, unit in ((self.samples_per_second, "samples/s"), (self.tokens_per_second, "tokens/s")):
            facts += [f"{speed:.3g} {unit}" if speed < 1000 else f"{speed:,.0f} {unit}"] if speed > 0 else []
        return facts


def duration(seconds: float) -> str:
    """A time as 0:42, 12:05 or 3:20:00 (hours, minutes, seconds)."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 0
