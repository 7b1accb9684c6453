"""Describes the machine that a worker runs on, and refuses versions of ONNX Runtime that crash on it.

Imports the standard library, and of this package what needs no more. Reads Linux's /proc and /sys; a value that a
system does not have is None.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from microvlm.backends.threads import usable_cores

OLDEST_ONNXRUNTIME = (1, 25)
CRASHES = {
    "1.21.0": ("aarch64", "asimdhp", "it runs half-precision instructions when it is loaded"),
}
"""Version that ends in SIGILL on import -> (machine, CPU feature that it needs, reason). See onnxruntime issues 23957
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
        "cores": usable_cores(),
        "memory_bytes": int(memory[1]) * 1024 if memory else None,
        "system": f"{platform.system()} {platform.release()}",
        "c_library": " ".join(platform.libc_ver()).strip(),
        "python": platform.python_version(),
        "onnxruntime": installed_version("onnxruntime"),
    }


def condition() -> dict[str, Any]:
    """Values that change: memory of this process and of the machine in bytes, temperature, clock, throttling."""
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
    """A package's version from its metadata, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def onnxruntime_refusal() -> str | None:
    """One sentence why the installed ONNX Runtime must not be imported; None where it may."""
    version = installed_version("onnxruntime")
    if version is None:
        return "onnxruntime is not installed; pip install onnxruntime."
    if version in CRASHES:  # describing the machine takes as long as checking a bundle
        machine = describe()
        crash = crash_of(version, machine["machine"], machine["features"])
        if crash is not None:
            return (
                f"onnxruntime {version} crashes on this processor ({machine['cpu']}): {crash}; "
                f"pip install 'onnxruntime>={_oldest()}'."
            )
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_ONNXRUNTIME:
        return f"onnxruntime {version} is too old; pip install 'onnxruntime>={_oldest()}'."
    return None


def crash_of(version: str, machine: str, features: list[str]) -> str | None:
    """Why a version of ONNX Runtime crashes on a processor, in a few words; None where no crash is known."""
    if version not in CRASHES:
        return None
    crashing_machine, feature, reason = CRASHES[version]
    return reason if machine == crashing_machine and feature not in features else None


def _oldest() -> str:
    return ".".join(map(str, OLDEST_ONNXRUNTIME))


def _cpu_name(cpuinfo: str) -> str:
    part = re.search(r"^CPU part\s*:\s*(0x[0-9a-f]+)", cpuinfo, re.M)
    if part:
        return _PARTS.get(int(part[1], 16), f"Arm part {part[1]}")
    name = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.M)
    return name[1] if name else platform.processor()


def _hwcap() -> int | None:
    """The kernel's AT_HWCAP for this process."""
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
    match = re.search(rf"^{name}:\s*(\d+) kB", text, re.M)
    return int(match[1]) * 1024 if match else None
