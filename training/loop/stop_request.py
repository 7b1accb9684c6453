"""The first interrupt of a run: the step ends and is saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag, so that a step ends and is saved; the second ends at once.

    grace : seconds within which another signal is the same request; a launcher passes on what a terminal sends too.
    """

    def __init__(self, log: Callable[[str], None], grace: float = 0.0):
        self.log, self.requested, self.grace = log, False, grace
        self._first = 0.0
        self._old: dict[int, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            hangup = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
            for number in (signal.SIGINT, signal.SIGTERM, *hangup):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        if os.getpid() != self._owner:  # a worker, which the parent ends
            return
        now = time.monotonic()
        if self.requested:
            if now - self._first < self.grace:
                return
            raise KeyboardInterrupt
        self.requested, self._first = True, now
        self.log("stopping after this step; once more to stop at once, without saving it")
