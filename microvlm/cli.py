"""Entry points of the console scripts. They import a command's modules only when they run, and handle Ctrl-C in it.

Until `_run` has its handler, an interrupt is a traceback: so this module and the package's imports next to nothing, and
takes `_signal`, which is in the interpreter, since the module signal builds enumerations.
"""

from __future__ import annotations

import _signal
import _thread
import importlib
import os
import sys

from microvlm.errors import INTERRUPTED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

PROGRAMS = {
    "microvlm": "microvlm.commands.main",
    "microvlm-export": "microvlm.exporters.export_command",
    "microvlm-bench": "microvlm.bench.bench_command",
    "microvlm-train": "microvlm.training.train_command",
    "microvlm-score": "microvlm.training.scoring.score_command",
    "microvlm-data": "microvlm.training.data.data_command",
}
"""Console script -> the module whose `whole_command()` is its click command, and whose `main()` runs that."""


def main() -> None:
    """`microvlm`."""
    _run("microvlm")


def export() -> None:
    """`microvlm-export`."""
    _run("microvlm-export")


def bench() -> None:
    """`microvlm-bench`."""
    _run("microvlm-bench")


def train() -> None:
    """`microvlm-train`."""
    _run("microvlm-train")


def score() -> None:
    """`microvlm-score`."""
    _run("microvlm-score")


def data() -> None:
    """`microvlm-data`."""
    _run("microvlm-data")


def __getattr__(name: str) -> Any:
    if name == "cli":
        return importlib.import_module("microvlm.commands.main").cli
    raise AttributeError(f"module 'microvlm.cli' has no attribute '{name}'")


def _run(program: str) -> None:
    """Import a program's module and call its `main`. An interrupt gives status 130, whenever it comes."""
    module = PROGRAMS[program]
    _occupy_standard_streams()
    # A shell starts programs in the background with SIGINT ignored: that stays so.
    if _signal.getsignal(_signal.SIGINT) is not _signal.default_int_handler:
        importlib.import_module(module).main()
        return
    _signal.signal(_signal.SIGINT, _leave)
    sys.unraisablehook = _repeat_interrupt
    command = importlib.import_module(module).main
    try:
        try:
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)
            command()
        finally:
            # The interpreter's own end, in which an interrupt is a traceback, takes milliseconds.
            _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
    except KeyboardInterrupt:
        _leave()


def _leave(*_: Any) -> NoReturn:
    """End at once: nothing was begun yet that must be cleaned up."""
    try:
        os.write(2, b"Interrupted.\n")
    finally:
        os._exit(INTERRUPTED)


def _repeat_interrupt(unraisable: Any) -> None:
    """An interrupt in a destructor or a callback, which cannot raise it, is raised again after it."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    # By another thread: this one would raise it here, where it is lost again.
    _thread.start_new_thread(_thread.interrupt_main, ())


def _occupy_standard_streams() -> None:
    """Open closed descriptors 0, 1 and 2 on the null device: a file of the command's must not become its stdout."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
