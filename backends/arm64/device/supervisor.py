"""Runs a program in a forked child and tells how it died: a crash at an instruction or for memory becomes a sentence.

The parent imports nothing and waits; what the child was doing is a word in memory that both share.
"""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable

_LONGEST = 200
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_QUIET = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE)
"""Somebody wanted the child to end, or nobody reads it any more."""


class Doing:
    """What the child does at present, as in "importing ONNX Runtime 1.32.0"; the parent reads it after its death."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _LONGEST)

    def set(self, what: str) -> None:
        text = what.encode(errors="replace")[: _LONGEST - 1]
        self._memory[: len(text) + 1] = text + b"\0"

    def get(self) -> str:
        return self._memory[:].split(b"\0")[0].decode(errors="replace")


def supervise(work: Callable[[Doing], int], bury: Callable[[str], None]) -> int:
    """Run `work` in a child -> its exit status. Killed by a signal, `bury` gets the sentence and the status is 1."""
    doing = Doing()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = work(doing)
        finally:
            os._exit(status)
    for number in _PASSED_ON:
        signal.signal(number, lambda caught, _: os.kill(pid, caught))
    _, ended = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(ended):
        return os.WEXITSTATUS(ended)
    if os.WTERMSIG(ended) not in _QUIET:
        bury(cause_of_death(os.WTERMSIG(ended), doing.get()))
    return 1


def cause_of_death(number: int, what: str) -> str:
    """One sentence for a child that signal `number` ended while it was doing `what`."""
    if number == signal.SIGILL:
        return (
            f"this processor lacks an instruction (SIGILL) that was needed while {what}: "
            "install another version of onnxruntime."
        )
    if number == signal.SIGKILL:
        return f"the worker was killed (SIGKILL) while {what}: most likely the device ran out of memory."
    return f"the worker was ended by {signal.Signals(number).name} while {what}."
