"""The C heap of a long run: its free pages go back to the system now and then."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

TRIM_EVERY = 10
"""Steps between two trims; one takes some milliseconds."""


def trim_heap() -> None:
    """Give free pages back, where the C library can (glibc).

    Rows of other lengths have tensors of other sizes, and a heap that serves them breaks into pieces: a distillation of
    SmolLM2 on captions grew from 7 to 15 GB in 200 steps, without one tensor more.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library; Windows takes no None
        return None
