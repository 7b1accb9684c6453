"""What a long command is doing: on a terminal a line that moves, in a log one line a step. Both on stderr.

On a terminal the line says the step, a bar where the step counts itself ("round 3 of 5"), and its seconds, once a
second: rarely enough for a benchmark. A step that is over stays above it, unless the next is the same one counted on.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from microvlm import console
from microvlm.escaping import printable
from microvlm.terminal.answer_line import cell_width, is_terminal

BAR_CELLS = 20
_TICK_S = 1.0
_LOG_EVERY_S = 10.0
_COUNT = re.compile(r"(\d[\d,]*) of (\d[\d,]*)")
_ERASE_LINE = "\r\033[K"


def step(text: str) -> None:
    """Say what a command does next, in place of what it did."""
    if is_terminal(sys.stderr):
        _line.begin(text, stays=True)
    else:
        console.note(text)


def counted(what: str) -> Callable[[int, int], None]:
    """A function of (done, total) that shows both before `what`; in a log every ten seconds."""
    said = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal said
        if is_terminal(sys.stderr) or time.monotonic() - said > _LOG_EVERY_S:
            said = time.monotonic()
            step(f"{done:,} of {total:,} {what}")
        if done >= total:
            _line.end()

    return show


def doing(text: str) -> None:
    """Show what takes seconds from now on, where notes say what was done: on a terminal, where nothing of it stays."""
    if is_terminal(sys.stderr):
        _line.begin(text, stays=False)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Within, a terminal shows `text` and the seconds; nothing of it stays, and a log gets nothing."""
    doing(text)
    try:
        yield
    finally:
        _line.end()


def render(text: str, seconds: float, cells: int) -> str:
    """The moving line in at most so many cells of a terminal."""
    ending = f"  {seconds:.0f} s"
    count = _COUNT.search(text)
    if count is not None:
        done, total = (int(number.replace(",", "")) for number in count.groups())
        share = min(1.0, done / total) if total else 1.0
        ending = f"  [{'#' * round(BAR_CELLS * share):<{BAR_CELLS}}]{ending}"
    room = cells - len(ending)
    while cell_width(text) > room and text:
        text = text[:-1]
    return f"{text}{ending}"[: max(0, cells)]


class _LiveLine:
    """The last line of the terminal. Threads may write: each change is made under a lock."""

    def __init__(self) -> None:
        self._text, self._stays, self._is_parents = "", False, False
        self._began = self._not_before = 0.0
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()  # a signal's handler may write a note in the middle of a change
        self._thread: threading.Thread | None = None

    def leave_to_parent(self) -> None:
        """In a forked child, which has no thread that moves the line, and perhaps its lock held."""
        self._start()
        self._text, self._is_parents = "", bool(self._text)

    def begin(self, text: str, stays: bool) -> None:
        text = printable(text)
        with self._lock:
            if self._text and not _goes_on(self._text, text):
                self.end()
            if not self._text:
                self._began = time.monotonic()
            self._text, self._stays = text, stays
            self._draw()
            if self._thread is None:
                self._thread = threading.Thread(target=self._tick, daemon=True)
                self._thread.start()

    def give_way(self) -> None:
        with self._lock:
            if self._text or self._is_parents:
                self._write(_ERASE_LINE)
                self._not_before = time.monotonic() + _TICK_S / 2

    def end(self) -> None:
        with self._lock:
            if self._text:
                seconds = time.monotonic() - self._began
                lasted = f"  {seconds:.0f} s" if seconds >= 1 else ""
                self._write(_ERASE_LINE + (f"{self._text}{lasted}\n" if self._stays else ""))
                self._text = ""

    def _tick(self) -> None:
        while True:
            time.sleep(_TICK_S)
            with self._lock:
                if self._text and time.monotonic() >= self._not_before:
                    self._draw()

    def _draw(self) -> None:
        # The last column stays free: some terminals go to the next line behind it.
        cells = shutil.get_terminal_size().columns - 1
        self._write(_ERASE_LINE + render(self._text, time.monotonic() - self._began, cells))

    @staticmethod
    def _write(text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()


def _goes_on(before: str, text: str) -> bool:
    """Whether `text` is the step `before`, counted on."""
    return bool(_COUNT.search(text)) and _COUNT.sub("", before) == _COUNT.sub("", text)


_line = _LiveLine()
console.live_line = _line
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_line.leave_to_parent)
