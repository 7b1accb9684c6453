"""The C heap of a long run: large blocks go back to the system when they are freed, free pages now and then."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

TRIM_EVERY = 10
"""Steps between two trims; one takes some milliseconds."""


LARGE_BLOCK = 8 << 20
"""Bytes from which a block is mapped by itself."""
_M_MMAP_THRESHOLD = -3


def map_large_blocks() -> None:
    """Keep large blocks out of the heap, where the C library can (glibc).

    By itself it maps blocks of up to 32 MB only until the first of them is freed. Logits and gradients then share the
    heap with small tensors, and a freed one leaves a hole: training SmolLM2 on captions grew to 13 GB in 90 steps. A
    size that the user chose in the environment stays.
    """
    chosen = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    library = _library()
    if not chosen and library is not None and hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)


def trim_heap() -> None:
    """Give free pages back, where the C library can (glibc).

    Rows of other lengths have tensors of other sizes, and a heap that serves them breaks into pieces: a distillation of
    SmolLM2 on captions grew from 7 to 15 GB in 200 steps, without one tensor more.
    """
    library = _library()
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


@cache
def _library() -> Any:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows takes no None
        return None
