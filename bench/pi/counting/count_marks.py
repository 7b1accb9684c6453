"""Marks for `sources/instruction_count.c`: system calls that change nothing, here and on a board."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

_REGION = 0x7E570000
_LIBRARY = 0x7E580000
_LISTED_REGION = 0x7E590000
_SCHED_GET_PRIORITY_MAX = 125
"""aarch64's number of the system call; it takes one argument and ignores the others."""
_libc = ctypes.CDLL(None)


def mark(region: int, listed: bool = False) -> None:
    """Count the instructions that follow in `region`, 1 to 65535; 0 stops counting.

    listed : also list which code of the library follows which, once for a region.
    """
    _libc.sched_get_priority_max((_LISTED_REGION if listed else _REGION) | region)


def mark_library(path: Path) -> None:
    """Code of the loaded library at `path` is counted apart from now on. Nothing happens on another architecture."""
    if platform.machine() != "aarch64":
        return
    start, end = mapped_range(path, Path("/proc/self/maps").read_text())
    _libc.syscall(
        ctypes.c_long(_SCHED_GET_PRIORITY_MAX),
        ctypes.c_long(_LIBRARY),
        ctypes.c_long(start),
        ctypes.c_long(end),
    )


def mapped_range(path: Path, maps: str) -> tuple[int, int]:
    """Lowest and highest address of a file in the text of /proc/PID/maps; (0, 0) for one that is not mapped."""
    spans = [line.split()[0].split("-") for line in maps.splitlines() if line.endswith(f" {path}")]
    if not spans:
        return 0, 0
    return min(int(low, 16) for low, _ in spans), max(int(high, 16) for _, high in spans)
