"""Runs a function in a forked child and explains its death, by an illegal instruction or for memory, in one sentence.

The parent imports nothing and waits. Shared memory tells it what the child was doing.
"""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable

_LONGEST = 200
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_QUIET = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE)
"""Signals that need no explanation: somebody ended the child, or its reader is gone."""


class Activity:
    """The child's current activity, such as "importing onnxruntime 1.32.0"; the parent reads it after a crash."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _LONGEST)

    def set(self, activity: str) -> None:
        text = activity.encode(errors="replace")[: _LONGEST - 1]
        self._memory[: len(text) + 1] = text + b"\0"

    def get(self) -> str:
        return self._memory[:].split(b"\0")[0].decode(errors="replace")


def supervise(work: Callable[[Activity], int], report_death: Callable[[str], None]) -> int:
    """Run `work` in a child -> its exit status; 1 after a signal, for which `report_death` gets a sentence."""
    activity = Activity()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = work(activity)
        finally:
            os._exit(status)
    for number in _FORWARDED:
        signal.signal(number, lambda caught, _: os.kill(pid, caught))
    _, ended = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(ended):
        return os.WEXITSTATUS(ended)
    if os.WTERMSIG(ended) not in _QUIET:
        report_death(cause_of_death(os.WTERMSIG(ended), activity.get()))
    return 1


def cause_of_death(number: int, activity: str) -> str:
    """One sentence for a child that signal `number` ended during `activity`."""
    if number == signal.SIGILL:
        return (
            f"this processor lacks an instruction (SIGILL) that was needed while {activity}: "
            "install another version of onnxruntime."
        )
    if number == signal.SIGKILL:
        return f"the worker was killed (SIGKILL) while {activity}: most likely the device ran out of memory."
    return f"the worker was ended by {signal.Signals(number).name} while {activity}."
