"""What a device that is reached over ssh needs, copied once and named by its content: Python packages where its own are
missing or too old, this package with the native library for its processor, the bundle.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from microvlm.backends.arm64.child import Child
from microvlm.backends.arm64.frames import Garbled, Tensor, write_frame
from microvlm.backends.arm64.link import BrokenWorker, ask
from microvlm.backends.arm64.package import package_for
from microvlm.backends.emulation.progress import Progress
from microvlm.backends.emulation.sites import ensure_wheels, runtime_requirements
from microvlm.backends.resolve import MANIFEST, open_bundle, sha256
from microvlm.cli_support import note
from microvlm.errors import UserError

WORKER_PACKAGES = ("numpy", "onnxruntime", "click", "safetensors")
"""What the worker imports of what microvlm requires."""
PIECE_BYTES = 1 << 20


class Delivery:
    """To the installer that has greeted over `child`. Methods raise UserError, and Lost when the connection breaks."""

    def __init__(self, child: Child, place: str, report: Progress):
        self._child, self._place, self._report = child, place, report
        self._ids = 0
        self._device = self._ask("look", packages=WORKER_PACKAGES)
        if self._device["bits"] != 64:
            raise UserError(f"{place} has a 32-bit system: install the 64-bit Raspberry Pi OS.")

    def packages(self) -> list[str]:
        """Folders for the worker's path, below the device's cache."""
        machine = self._device["machine"]
        package = package_for(machine)
        folder = f"packages/{package.digest[:16]}"
        if not self._ask("exists", folder=folder)["exists"]:
            if package.lacks:
                note(f"{self._place} ({machine}) runs without the native library: {package.lacks}")
            self._put("wheels", "microvlm.zip", package.content, "microvlm")
            self._ask("unpack", folder=folder, files=["wheels/microvlm.zip"])
        return [folder, *self._site()]

    def bundle(self, bundle: Path) -> str:
        """The bundle's folder on the device."""
        manifest = open_bundle(bundle)
        described = (bundle / MANIFEST).read_bytes()
        digest = hashlib.sha256(described).hexdigest()
        folder = f"bundles/{digest[:16]}"
        files = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        self._send_files(folder, bundle, {**files, MANIFEST: len(described)}, f"{bundle.name}")
        return f"{self._device['root']}/{folder}"

    def start(self, path: list[str], arguments: list[str], environment: Mapping[str, str]) -> None:
        """The installer becomes the worker, whose greeting is the next thing to come."""
        self._ids += 1
        request = {"id": self._ids, "do": "start", "path": path, "arguments": arguments}
        write_frame(self._child.requests, {**request, "environment": dict(environment)})

    def _site(self) -> list[str]:
        """Packages that the device's Python lacks, as a folder of wheels unpacked there."""
        wanted = [each for each in runtime_requirements() if _name(each) in WORKER_PACKAGES]
        if all(_satisfied(name, self._device["versions"][name]) for name in WORKER_PACKAGES):
            return []
        library, version = self._device["c_library"]
        if library != "glibc":
            raise UserError(
                f"{self._place} has no glibc, for which packages are built: install microvlm there, and name its "
                "Python with MICROVLM_DEVICE_PYTHON."
            )
        glibc = int(version.split(".")[1])
        folder = ensure_wheels(self._device["python"], glibc, self._device["machine"], wanted, self._report)
        wheels = sorted(folder.glob("*.whl"))
        digest = hashlib.sha256(json.dumps([path.name for path in wheels]).encode()).hexdigest()[:16]
        site = f"sites/{digest}"
        if not self._ask("exists", folder=site)["exists"]:
            sizes = {path.name: path.stat().st_size for path in wheels}
            self._send_files("wheels", folder, sizes, "Python packages")
            self._ask("unpack", folder=site, files=[f"wheels/{name}" for name in sizes])
        return [site]

    def _send_files(self, folder: str, source: Path, sizes: dict[str, int], what: str) -> None:
        """The manifest comes last: a folder with one is whole."""
        missing = self._ask("missing", folder=folder, files=sizes)["missing"]
        total, done = sum(sizes[name] for name in missing), 0
        for name in sorted(missing, key=lambda name: (name == MANIFEST, name)):
            path, offset = source / name, 0
            digest = sha256(path)
            with path.open("rb") as file:
                offset = missing[name] if missing[name] < sizes[name] else 0
                file.seek(offset)
                while True:
                    piece = file.read(PIECE_BYTES)
                    last = offset + len(piece) == sizes[name]
                    self._piece(folder, name, piece, offset, digest if last else "")
                    offset += len(piece)
                    done += len(piece)
                    self._report(f"copying {what} to {self._place}", min(1.0, done / max(1, total)))
                    if last:
                        break

    def _put(self, folder: str, name: str, content: bytes, what: str) -> None:
        self._report(f"copying {what} to {self._place}", 0)
        self._piece(folder, name, content, 0, hashlib.sha256(content).hexdigest())
        self._report(f"copying {what} to {self._place}", 1)

    def _piece(self, folder: str, name: str, data: bytes, offset: int, digest: str) -> None:
        tensor = Tensor("uint8", (len(data),), data)
        self._ask("put", (tensor,), folder=folder, name=name, offset=offset, sha256=digest)

    def _ask(self, what: str, tensors: tuple[Tensor, ...] = (), **request: Any) -> dict[str, Any]:
        self._ids += 1
        try:
            return ask(self._child, {"id": self._ids, "do": what, **request}, tensors)[0]
        except (Garbled, BrokenWorker, UserError) as error:
            self._child.end(patience_s=1)
            raise UserError(f"{self._place}: {error}") from None


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _satisfied(package: str, version: str | None) -> bool:
    """Whether a version is as new as microvlm requires."""
    if version is None:
        return False
    for requirement in importlib.metadata.requires("microvlm") or []:
        if _name(requirement) == package and "extra ==" not in requirement:
            oldest = re.search(r">=\s*([\d.]+)", requirement)
            return oldest is None or _numbers(version) >= _numbers(oldest[1])
    return True


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]
