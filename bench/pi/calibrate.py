"""`--calibrate`: measures this machine and writes a profile of it, for predictions that rest on the board itself.

Bandwidth: a read-only stream with one thread and with all. Kernels: the operators of the table, in a cache, on a core.
Other code: a model's decode on one thread, less what its kernels take, against the baseline's count of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from microvlm.atomic import write_file
from microvlm.backends import native, resolve_bundle
from microvlm.backends.native import kernel_calls
from microvlm.bench.pi import count_baseline
from microvlm.bench.pi.profiles import NUMBERS, Profile
from microvlm.bench.pi.real_board import conditions, throttling
from microvlm.bench.pi.workload_phases import Scenario, Work
from microvlm.bench.roofline import ARRAY_BYTES, StreamingRoofline
from microvlm.bench.stats import median
from microvlm.errors import UserError
from microvlm.formats.op_table import MATMUL_BY_KIND, OPS, TERNARY_2X4, TERNARY_3X5
from microvlm.sources.model_source import DEFAULT_MODEL

SHAPE = (896, 896)
"""K and N of a product: 200 KB at two bits, which every board's L2 holds."""
TOKENS = (1, 32)
ROUNDS = 9
OPERATORS = tuple(op.name for op in MATMUL_BY_KIND.values())
INSTRUCTIONS_PER_MAC = {(TERNARY_2X4.name, 1): 0.25, (TERNARY_3X5.name, 1): 0.31}
"""Counted on an emulated Cortex-A53 at 896 x 4864, quantisation included."""


def calibrate(
    like: Profile,
    progress: Callable[[str], None] = lambda _: None,
    root: Path = Path("/"),
    array_bytes: int = ARRAY_BYTES,
    model: str = DEFAULT_MODEL,
) -> dict[str, Any]:
    """A profile's document, with what was measured on this machine in place of `like`'s numbers, and the tables.

    A number that cannot be measured here keeps its value and its source. Raises UserError without a native library.
    """
    before = conditions(root)
    cores = _cores()
    progress(f"reading memory with 1 and {cores} threads")
    stream = StreamingRoofline(array_bytes)
    streams = {threads: stream.sample(threads) for threads in (1, cores)}
    progress("timing the operators")
    table = operator_table()
    measured: dict[str, tuple[float, str]] = {"cores": (cores, "the operating system")}
    slow, fast = min(streams.values()), max(streams.values())
    measured["bandwidth_low_bytes_per_s"] = (
        slow * 1e9,
        "read-only stream, the slower of 1 and all threads",
    )
    measured["bandwidth_high_bytes_per_s"] = (
        fast * 1e9,
        "read-only stream, the faster of 1 and all threads",
    )
    clocks = before["clock_limit_hz"] or before["clock_hz"]
    if clocks:
        clock = float(max(clocks.values()))
        measured["clock_hz"] = clock, "cpufreq"
        kernel = kernel_ipc(table, clock)
        measured["kernel_ipc"] = kernel * cores, f"one core at batch 1, times {cores} cores"
        progress(f"timing {model}")
        scalar = scalar_ipc(model, kernel, clock)
        if scalar is not None:
            measured["scalar_ipc"] = (
                scalar,
                "the model's decode less its kernels, over the counted instructions",
            )
        else:
            progress(
                f"scalar_ipc stays that of {like.name}: no baseline counts {model}, or its kernels took all time"
            )
    numbers = {
        name: {
            "value": like[name],
            "basis": like.entry(name).basis,
            "source": f"{like.name}: {like.entry(name).source}",
        }
        for name in NUMBERS
    }
    numbers |= {
        name: {"value": value, "basis": "measured", "source": source}
        for name, (value, source) in measured.items()
    }
    return {
        "name": f"this machine, like {like.name}",
        "cpu": like.cpu,
        "calibrated": "kernel_ipc" in measured,
        "numbers": numbers,
        "stream_gb_per_s": {str(threads): round(value, 3) for threads, value in streams.items()},
        "operators": table,
        "conditions": {"before": before, "after": conditions(root), "throttling": throttling(root)},
    }


def operator_table(shape: tuple[int, int] = SHAPE) -> list[dict[str, Any]]:
    """Microseconds and multiply-adds a second of every operator, on the calling thread, weights in a cache."""
    variant = native.active_variant()
    k, n = shape
    rows = []
    for op in OPERATORS:
        packed, scale, multiplier = _operands(op, k, n)
        for tokens in TOKENS:
            x = np.random.default_rng(0).standard_normal((tokens, k), np.float32)
            times = []
            for _ in range(ROUNDS + 1):
                began = time.perf_counter()
                kernel_calls.multiply(variant, op, x, packed, scale, n, multiplier)
                times.append(time.perf_counter() - began)
            seconds = median(times[1:])
            rows.append(
                {
                    "op": op,
                    "k": k,
                    "n": n,
                    "tokens": tokens,
                    "variant": variant,
                    "microseconds": round(seconds * 1e6, 2),
                    "macs_per_s": round(k * n * tokens / seconds),
                }
            )
    return rows


def kernel_ipc(table: list[dict[str, Any]], clock_hz: float) -> float:
    """Counted instructions a cycle of the operators whose count is known, on one core: the slowest of them."""
    rates = [
        row["macs_per_s"] * INSTRUCTIONS_PER_MAC[row["op"], row["tokens"]] / clock_hz
        for row in table
        if (row["op"], row["tokens"]) in INSTRUCTIONS_PER_MAC
    ]
    return min(rates)


def scalar_ipc(
    model: str, kernel_ipc_of_core: float, clock_hz: float, cpu: str = "cortex-a53"
) -> float | None:
    """Instructions a cycle outside of the kernels; None without a baseline, or if kernels took all the time."""
    baseline = count_baseline.load(count_baseline.path_of(Path(model).name.split("-")[0], cpu))
    counted = None if baseline is None else baseline.phases.get("decode")
    if counted is None:
        return None
    from microvlm.backends.arm64.device.graph_server import DeviceOrtRuntime, DeviceSettings

    work = Work(DeviceOrtRuntime(resolve_bundle(model), DeviceSettings(threads=1)), Scenario())
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work.run("decode")
        times.append((time.perf_counter() - began) / work.repeats_in("decode"))
    kernels = (counted.instructions - counted.others) / (clock_hz * kernel_ipc_of_core)
    rest = median(times) - kernels
    return counted.others / (clock_hz * rest) if rest > 0 else None


def write(document: dict[str, Any], path: Path) -> None:
    write_file(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _operands(op: str, k: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Bytes that every format knows; times do not depend on them."""
    scale = np.full(n, 1e-3, np.float32)
    shapes = {name: shape for name, (shape, _) in OPS[op].weight_types(n, k, scales=n).items()}
    packed = np.resize(np.array([0, 85, 170], np.uint8), shapes["packed"])
    multiplier = np.ones(shapes["multiplier"], np.uint8) if "multiplier" in shapes else None
    return packed, scale, multiplier


def _cores() -> int:
    from microvlm.backends.threads import usable_cores

    if native.library_path() is None:
        raise UserError(
            "--calibrate times the native kernels, and there are none here: install an aarch64 wheel."
        )
    return usable_cores()
