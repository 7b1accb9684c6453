"""Times the phases on a real board and reads what may have slowed them: heat, clock, throttling.

Linux's files and vcgencmd; every reader takes the root of the file system, so that a copy of a board's can be read.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from microvlm.backends import load
from microvlm.bench.pi.workload_phases import PHASES, PICTURE, Scenario, Work
from microvlm.bench.stats import summarise

THROTTLED_FILE = "sys/devices/platform/soc/soc:firmware/get_throttled"
THROTTLED_BITS = {
    0: "under-voltage now",
    1: "frequency capped now",
    2: "throttled now",
    3: "soft temperature limit now",
    16: "under-voltage happened",
    17: "frequency capping happened",
    18: "throttling happened",
    19: "soft temperature limit happened",
}
"""Meaning of the bits of the firmware's get_throttled (raspberrypi.com, documentation of vcgencmd)."""


def measure(bundle: Path, target: str, scenario: Scenario, repeats: int) -> dict[str, Any]:
    """`measured_ms` rows (phase, median_ms, p10_ms, p90_ms, repeats; decode is one token) and `board` before and after.

    Phases go through the link of `ort-arm64`: over ssh a round trip is in each, and pictures are decoded on this side
    of it, so that their time is left out. Raises UserError.
    """
    runtime: Any = load("ort-arm64", bundle, None, target=target)
    work = Work(runtime, scenario)
    before = runtime.condition()
    rows = []
    for phase in PHASES:
        if phase == PICTURE and target != "local":
            continue
        times = []
        for attempt in range(repeats + 1):
            began = time.perf_counter()
            work.run(phase)
            if attempt:
                times.append((time.perf_counter() - began) * 1e3 / work.repeats_in(phase))
        rows.append({"phase": phase, **summarise(times)})
    state = {
        "device": runtime.device,
        "kernels": runtime.kernels,
        "before": before,
        "after": runtime.condition(),
    }
    if target == "local":
        state["throttling"] = throttling()
    return {"measured_ms": rows, "board": state}


def conditions(root: Path = Path("/")) -> dict[str, Any]:
    """temperatures_celsius by zone, clock_hz and its limit by core, governor. What a system does not tell is absent."""
    zones = {}
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        millidegrees = _number(zone / "temp")
        if millidegrees is not None:
            zones[_text(zone / "type") or zone.name] = millidegrees / 1e3
    clocks: dict[str, int] = {}
    limits: dict[str, int] = {}
    governors: set[str] = set()
    for folder in sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq")):
        core = folder.parent.name
        for name, table in (("scaling_cur_freq", clocks), ("cpuinfo_max_freq", limits)):
            kilohertz = _number(folder / name)
            if kilohertz is not None:
                table[core] = kilohertz * 1000
        governors |= {_text(folder / "scaling_governor")} - {""}
    return {
        "temperatures_celsius": zones,
        "clock_hz": clocks,
        "clock_limit_hz": limits,
        "governor": ", ".join(sorted(governors)),
    }


def throttling(root: Path = Path("/"), vcgencmd: str | None = None) -> dict[str, Any] | None:
    """`value` of the firmware's get_throttled and `meaning`, by its file or by vcgencmd; None where neither is."""
    text = _text(root / THROTTLED_FILE)
    program = vcgencmd or shutil.which("vcgencmd")
    if not text and program:
        process = subprocess.run([program, "get_throttled"], capture_output=True, text=True)
        text = process.stdout.strip() if process.returncode == 0 else ""
    match = re.fullmatch(r"(?:throttled=0x|0x)?([0-9a-fA-F]+)", text)
    if match is None:
        return None
    value = int(match[1], 16)
    return {"value": value, "meaning": [words for bit, words in THROTTLED_BITS.items() if value >> bit & 1]}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if re.fullmatch(r"-?\d+", text) else None
