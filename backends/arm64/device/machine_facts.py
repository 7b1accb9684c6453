"""What the machine is that a worker runs on, and which ONNX Runtime it must not import. Standard library alone.

Linux's /proc and /sys where there are any; a figure that a system does not give is None.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

OLDEST_ONNXRUNTIME = (1, 25)
CRASHES = {
    "1.21.0": ("aarch64", "asimdhp", "it runs half-precision instructions when it is loaded"),
}
"""Versions that end in SIGILL on import: (machine, the feature whose absence it takes, why). onnxruntime issues 23957
and 24512."""
_PARTS = {0xD03: "Cortex-A53", 0xD08: "Cortex-A72", 0xD0B: "Cortex-A76"}
_AT_HWCAP = 16


def describe() -> dict[str, Any]:
    """machine, cpu, features (list of names), hwcap, cores, memory_bytes, python, onnxruntime, c_library."""
    cpuinfo = _read("/proc/cpuinfo")
    features = re.search(r"^(?:Features|flags)\s*:\s*(.*)$", cpuinfo, re.M)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.M)
    return {
        "machine": platform.machine(),
        "cpu": _cpu_name(cpuinfo),
        "board": _read("/proc/device-tree/model").strip("\0\n"),
        "features": features[1].split() if features else [],
        "hwcap": _hwcap(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": int(memory[1]) * 1024 if memory else None,
        "system": f"{platform.system()} {platform.release()}",
        "c_library": " ".join(platform.libc_ver()).strip(),
        "python": platform.python_version(),
        "onnxruntime": installed_version("onnxruntime"),
    }


def condition() -> dict[str, Any]:
    """What changes while it works: memory of this process and of the machine in bytes, heat, clock, throttling."""
    status, meminfo = _read("/proc/self/status"), _read("/proc/meminfo")
    temperature = _number(_read("/sys/class/thermal/thermal_zone0/temp"))
    clock = _number(_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"))
    throttled = _read("/sys/devices/platform/soc/soc:firmware/get_throttled").strip()
    return {
        "pid": os.getpid(),
        "peak_rss_bytes": _kilobytes("VmHWM", status),
        "rss_bytes": _kilobytes("VmRSS", status),
        "anonymous_bytes": _kilobytes("RssAnon", status),
        "file_backed_bytes": _kilobytes("RssFile", status),
        "available_bytes": _kilobytes("MemAvailable", meminfo),
        "swap_used_bytes": _kilobytes("VmSwap", status),
        "temperature_celsius": None if temperature is None else temperature / 1e3,
        "clock_hz": None if clock is None else clock * 1000,
        "throttled": throttled or None,
    }


def installed_version(package: str) -> str | None:
    """From the package's metadata, which imports nothing of it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def onnxruntime_refusal() -> str | None:
    """Why the ONNX Runtime that is installed here must not be imported, one sentence; None when it may."""
    version = installed_version("onnxruntime")
    if version is None:
        return "onnxruntime is not installed; pip install onnxruntime."
    here = describe()
    known = crash_of(version, here["machine"], here["features"])
    if known is not None:
        return (
            f"onnxruntime {version} crashes on this processor ({here['cpu']}): {known}; "
            f"pip install 'onnxruntime>={_oldest()}'."
        )
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_ONNXRUNTIME:
        return f"onnxruntime {version} is too old; pip install 'onnxruntime>={_oldest()}'."
    return None


def crash_of(version: str, machine: str, features: list[str]) -> str | None:
    """Why a version of ONNX Runtime is known to crash on a processor, a few words; None where it is not."""
    if version not in CRASHES:
        return None
    where, needed, reason = CRASHES[version]
    return reason if machine == where and needed not in features else None


def _oldest() -> str:
    return ".".join(map(str, OLDEST_ONNXRUNTIME))


def _cpu_name(cpuinfo: str) -> str:
    part = re.search(r"^CPU part\s*:\s*(0x[0-9a-f]+)", cpuinfo, re.M)
    if part:
        return _PARTS.get(int(part[1], 16), f"Arm part {part[1]}")
    name = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.M)
    return name[1] if name else platform.processor()


def _hwcap() -> int | None:
    """AT_HWCAP as the kernel gave it to this process."""
    try:
        getauxval = ctypes.CDLL(None).getauxval
    except (OSError, AttributeError):
        return None
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return int(getauxval(_AT_HWCAP))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


def _kilobytes(name: str, text: str) -> int | None:
    found = re.search(rf"^{name}:\s*(\d+) kB", text, re.M)
    return int(found[1]) * 1024 if found else None
