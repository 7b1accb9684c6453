"""How many threads this process may use: cores, the processor quota of its container, and limits of tasks and memory.

Imports the standard library and microvlm.errors alone. Reads Linux's /proc and /sys.
"""

from __future__ import annotations

import _thread
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from microvlm.errors import UserError

AUTO: Literal["auto"] = "auto"
"""In place of a number: the number that answers fastest, measured (`thread_choice`)."""
Threads = int | Literal["auto"] | None

_LEAST_LIMIT = 64
_START_S = 2.0
"""A thread that does not run after so long is one that could not start."""
_ROOT = Path("/")


def usable_cores(root: Path = _ROOT) -> int:
    """Number of cores that this process may keep busy: those it may run on, and no more than its container's quota.

    `root` is where proc/ and sys/ are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Part of a core is still used: 1.5 cores are 2 threads that wait now and then.
    quotas = (-(-quota // period) for quota, period in _quotas(root))
    return max(1, min([cores, *quotas]))


def most_threads() -> int:
    """The largest number of threads that makes sense to ask for: more only take memory and wait for each other."""
    return max(_LEAST_LIMIT, 4 * (os.cpu_count() or 1))


def check_threads(threads: int) -> int:
    """`threads`, as a person asked for them. Raises UserError for none and for more than `most_threads`."""
    if not isinstance(threads, int):
        raise UserError(f"--threads is {threads!r}; give a number, or {AUTO}.")
    if threads < 1:
        raise UserError(f"--threads is {threads}; give 1 or more.")
    if threads > most_threads():
        raise UserError(
            f"--threads is {threads}, more than the {most_threads()} that make sense on this machine; "
            f"its {usable_cores()} cores are best used by as many threads."
        )
    return threads


def pool_threads(threads: int | None, pools: int = 1) -> int:
    """The threads of each of `pools` thread pools, which start all but one of them: `threads`, else the usable cores.

    A library that cannot start a thread waits for ever, or ends the program. So the threads are started here first:
    where a limit of tasks or of memory forbids some, fewer are taken, unless `threads` asks for them: UserError.
    """
    count = usable_cores() if threads is None else check_threads(threads)
    startable = _startable(pools * (count - 1))
    if startable == pools * (count - 1):
        return count
    fewer = 1 + startable // pools
    if threads is None:
        return fewer
    raise UserError(
        f"--threads is {threads}, and a limit (of tasks: ulimit -u or a container's; or of memory) lets "
        f"this program start {startable} threads more; give --threads {fewer}."
    )


def _startable(count: int) -> int:
    """Start `count` threads at once, and end them -> how many could be started."""
    end, running, ended = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)

    def wait() -> None:
        running.release()
        end.wait()
        ended.release()

    started = 0
    try:
        for _ in range(count):
            # threading.Thread.start() waits for ever for a thread that has no memory for its first line.
            _thread.start_new_thread(wait, ())
            if not running.acquire(timeout=_START_S):
                break
            started += 1
    except (RuntimeError, MemoryError):  # "can't start new thread"
        pass
    end.set()
    for _ in range(started):
        ended.acquire(timeout=_START_S)
    return started


def _quotas(root: Path) -> Iterator[tuple[int, int]]:
    """(microseconds of processor time, in so many microseconds) of the groups of this process and of those above."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = ("cpu", "cpu,cpuacct") if controllers else ("", "unified")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            for depth in range(len(parts) + 1):
                folder = Path(root / "sys/fs/cgroup" / mount, *parts[:depth])
                texts = (
                    f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
                    if controllers
                    else _read(folder / "cpu.max")
                )
                words = texts.split()  # "max 100000" or "-1 100000": no quota
                if len(words) == 2 and all(word.isdecimal() and int(word) > 0 for word in words):
                    yield int(words[0]), int(words[1])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
