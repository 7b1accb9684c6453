"""Records where a measurement was made: machine, versions and this process's memory, from Linux's /proc if it exists.

Nothing here loads a backend: versions are read from package metadata.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
import urllib.parse
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import microvlm
from microvlm.backends.threads import usable_cores
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.manifest import MANIFEST, read_manifest
from microvlm.runtime import ReportsKernels, Runtime

PACKAGES = ("microvlm", "numpy", "onnxruntime", "torch", "tokenizers", "pillow")
_STATUS_FIELDS = {
    "VmHWM": "peak_rss_bytes",
    "VmRSS": "rss_bytes",
    "RssAnon": "anonymous_bytes",
    "RssFile": "file_backed_bytes",
    "RssShmem": "file_backed_bytes",
}
"""Fields of /proc/self/status. The kernel counts files of a tmpfs as shared memory."""


def memory_of_this_process() -> dict[str, int | None]:
    """Memory of this process in bytes: peak_rss, rss, anonymous, file_backed, pss; None where unknown.

    Mapped weights count as file-backed: clean pages that the system can drop and read again without swap.
    """
    figures: dict[str, int | None] = dict.fromkeys([*_STATUS_FIELDS.values(), "pss_bytes"])
    for line in _lines("/proc/self/status"):
        name, _, value = line.partition(":")
        if name in _STATUS_FIELDS:
            figure = _STATUS_FIELDS[name]
            figures[figure] = (figures[figure] or 0) + int(value.split()[0]) * 1024
    for line in _lines("/proc/self/smaps_rollup"):
        if line.startswith("Pss:"):
            figures["pss_bytes"] = int(line.split()[1]) * 1024
    return figures


def provenance(model: dict[str, Any], threads: int | None) -> dict[str, Any]:
    """Machine, versions, commit and date of a measurement. `model` is the result of `describe_model`."""
    return {
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "governor": _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "memory_bytes": _total_memory(),
        "machine": platform.machine(),
        "os": _os_name(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": package_versions(),
        "threads": threads,
        "model": model,
    }


def commit() -> dict[str, Any] | None:
    """Commit of the code that runs: `hash`, `date` (ISO 8601) and `changed`, whether files differ from it.

    None where the package is not from a git checkout: its own, or the one that a wheel was built from and that still
    holds the same modules.
    """
    package = Path(microvlm.__file__).parent
    checkout = package.resolve().parent
    if not (checkout / ".git").exists():
        origin = _installed_from()
        origin_checkout = (
            next((folder for folder in origin.parents if (folder / ".git").exists()), None)
            if origin
            else None
        )
        if origin_checkout is None or modules_hash(origin_checkout / "microvlm") != modules_hash(package):
            return None
        checkout = origin_checkout
    git = ["git", "-C", str(checkout)]
    try:
        commit_line = subprocess.run(
            [*git, "show", "-s", "--format=%H %cI"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    name, date = commit_line.stdout.split()
    return {"hash": name, "date": date, "changed": bool(changes.stdout.strip())}


def modules_hash(package: Path) -> str:
    """sha256 over the names and bytes of a package's Python files. Sub-packages of a checkout are links."""
    digest = hashlib.sha256()
    files = [Path(folder, name) for folder, _, names in os.walk(package, followlinks=True) for name in names]
    for file in sorted(file for file in files if file.suffix == ".py"):
        digest.update(f"{file.relative_to(package)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


class _DirectUrl(msgspec.Struct, frozen=True):
    """pip's record of where a package came from."""

    url: str


def _installed_from() -> Path | None:
    """The folder or wheel that pip installed this package from (PEP 610); None where it was a package index."""
    try:
        recorded = importlib.metadata.distribution("microvlm").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    try:
        place = (
            documents.parse(recorded, _DirectUrl, "direct_url.json", "install again").url if recorded else ""
        )
        url = urllib.parse.urlsplit(place)
    except (UserError, ValueError):
        return None
    return Path(urllib.parse.unquote(url.path), "_") if url.scheme == "file" else None


def package_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def recorded_name(model: str) -> str:
    """A model as reports name it: of a path from the root, which says where this machine keeps it, the last part."""
    return Path(model).name if os.path.isabs(model) else model


def describe_model(folder: Path) -> dict[str, Any]:
    """A bundle's or checkpoint's files in bytes, and one sha256 over all of them (names and contents, sorted).

    Of a bundle, those that its manifest lists, and the manifest: no pages to be read, and nothing left there since.
    """
    manifest = folder / MANIFEST
    if manifest.is_file():
        listed = read_manifest(folder).files
        files = sorted([manifest, *(folder / name for name in listed)])
    else:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    return {
        "name": folder.name,
        "sha256": digest.hexdigest(),
        "total_bytes": sum(sizes.values()),
        "files": sizes,
    }


def kernels_of(runtime: Runtime) -> str:
    """Name of the code that runs the quantised layers of a loaded runtime."""
    return runtime.kernels if isinstance(runtime, ReportsKernels) else "the backend's own"


def cpu_model() -> str:
    """x86 gives `model name`; boards give `Model` or only the part number."""
    fields: dict[str, str] = {}
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    for name in ("model name", "Model", "Hardware"):
        if fields.get(name):
            return fields[name]
    part = fields.get("CPU part")
    return f"{platform.machine()} part {part}" if part else platform.processor() or platform.machine()


def streaming_read_bytes_per_s(megabytes: int = 64, repeats: int = 5) -> float:
    """Bytes that one core reads from memory in a second: the best of a few sums over an array larger than caches."""
    array = np.ones(megabytes * 1_000_000 // 8, np.int64)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - began)
    return array.nbytes / best


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []


def _first_line(path: str) -> str | None:
    lines = _lines(path)
    return lines[0].strip() if lines else None


def _total_memory() -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _os_name() -> str:
    for line in _lines("/etc/os-release"):
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return platform.system()
