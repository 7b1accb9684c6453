"""The counted program: `python -m microvlm.bench.pi.counting.counted_model BUNDLE SCENARIO`, SCENARIO in JSON.

Runs every phase once unmarked, which opens sessions and asks for memory, then several times, each in a region of its
own. One thread, nobody spins, Python collects no garbage: a phase still takes a few thousand instructions more or less
each time, by how the C library's heap came to lie, and the same ones in every process. Prints one JSON document: the
regions of each phase, and what ran. Needs numpy and ONNX Runtime.
"""

from __future__ import annotations

import gc
import itertools
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from microvlm.bench.pi.counting.count_marks import mark, mark_library

LOAD_REGION = 1
RUNS = 25
"""The median of their counts is a phase's."""
LONG, SHORT = ("vision", "prefill", "picture"), ("memory_read", "memory_write", "memory_forget")
SHORT_RUNS = 101
"""Runs of a phase so small that those thousands are half a per cent of it."""
WIDE = 512
"""Width from which some thousand instructions do not matter and a run takes minutes."""


def run(bundle: str, options: dict[str, Any]) -> dict[str, Any]:
    """Counts load and phases, and says which region is which."""
    mark(LOAD_REGION)
    import onnxruntime  # noqa: F401  # a part of loading

    from microvlm.backends import native
    from microvlm.backends.arm64.device.graph_server import DeviceOrtRuntime, DeviceSettings
    from microvlm.bench.pi.workload_phases import GRAPHS, PHASES, Scenario, Work

    # Not hashed: a user's second start finds a bundle whose files were checked when it was copied.
    runtime = DeviceOrtRuntime(Path(bundle), DeviceSettings(threads=1, verify=False))
    for graph in sorted({graph for graphs in GRAPHS.values() for graph in graphs}):
        runtime.session(graph)
    mark(0)
    library = native.library_path()
    if library is not None:
        mark_library(library)
    work = Work(runtime, Scenario(**options))
    regions = {"load": {"regions": [LOAD_REGION], "repeats": 1}}
    unused = itertools.count(LOAD_REGION + 1)
    gc.disable()
    for phase in PHASES:
        numbers = [next(unused) for _ in range(runs_of(phase, runtime.config.text.hidden_size))]
        work.run(phase)
        for number in numbers:
            # The library executes the same code in each.
            mark(number, listed=number == numbers[-1])
            work.run(phase)
            mark(0)
        regions[phase] = {"regions": numbers, "repeats": work.repeats_in(phase)}
    return {
        "regions": regions,
        "kernels": runtime.kernels,
        "finite": work.is_finite(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
        "numpy": version("numpy"),
    }


def runs_of(phase: str, width: int) -> int:
    """Number of times that a phase of a model of this width runs in one counted process."""
    if width >= WIDE:
        return 1 if phase in LONG else 5
    if phase in SHORT:
        return SHORT_RUNS
    return 5 if phase in LONG else RUNS


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], json.loads(sys.argv[2]))))
