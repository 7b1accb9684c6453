"""The streaming roofline: how fast this machine reads memory, sampled through a run, and what share a kernel reaches.

Reads only, no writes, over an array that no cache holds, by numpy's vectorised sum, which waits for memory and not for
its additions. Knows no kernel.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from microvlm.bench.stats import median

ARRAY_BYTES = 256_000_000
PASSES = 3
"""Passes of a sample; the fastest counts, because other load on the machine can only make a pass slower."""


class StreamingRoofline:
    """Samples of the read bandwidth by thread count, taken beside every measurement because machines drift."""

    def __init__(self, array_bytes: int = ARRAY_BYTES, array: np.ndarray | None = None):
        # Written, not just reserved: pages that were never touched all read the one page of zeros.
        self._array = np.ones(array_bytes // 8, np.int64) if array is None else array
        self._samples: dict[int, list[float]] = {}

    @classmethod
    def of_mapped_file(cls, path: Path, array_bytes: int = ARRAY_BYTES) -> StreamingRoofline:
        """Measures reads of a mapped file in the page cache, as weights are read. Writes `path`. Raises OSError."""
        np.ones(array_bytes // 8, np.int64).tofile(path)
        return cls(array=np.asarray(np.memmap(path, np.int64, "r")))

    def sample(self, threads: int) -> float:
        """Read the array PASSES times with `threads` threads -> GB/s (1e9 bytes) of the best pass, and remember it."""
        parts = np.array_split(self._array, threads)
        seconds = min(_timed(parts) for _ in range(PASSES))
        gb_per_s = self._array.nbytes / seconds / 1e9
        self._samples.setdefault(threads, []).append(gb_per_s)
        return gb_per_s

    def gb_per_s(self, threads: int) -> float:
        """The median of the samples taken at this thread count. Raises KeyError where there are none."""
        return median(self._samples[threads])

    def summary(self) -> dict[str, float]:
        """{"1": GB/s, "2": GB/s}: JSON has no integer keys."""
        return {str(threads): round(self.gb_per_s(threads), 2) for threads in sorted(self._samples)}


def share(weight_bytes: float, seconds: float, stream_gb_per_s: float) -> float:
    """Share of the streaming bandwidth reached by reading `weight_bytes` in `seconds`. Above 1 from a cache."""
    return weight_bytes / seconds / 1e9 / stream_gb_per_s


def _timed(parts: Sequence[np.ndarray]) -> float:
    """Seconds to read all parts, each in its own thread. numpy releases the interpreter's lock."""
    others = [threading.Thread(target=np.add.reduce, args=(part,)) for part in parts[1:]]
    began = time.perf_counter()
    for thread in others:
        thread.start()
    np.add.reduce(parts[0])
    for thread in others:
        thread.join()
    return time.perf_counter() - began
