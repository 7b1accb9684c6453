"""Copies to a device what it needs, once, named by content: Python packages that it lacks, microvlm with the native
library for its processor, and the bundle.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from microvlm.backends.arm64 import messages
from microvlm.backends.arm64.device_errors import BUNDLE, PACKAGES
from microvlm.backends.arm64.frames import FrameError, Tensor, write_frame
from microvlm.backends.arm64.messages import DevicePython, Exists, Missing
from microvlm.backends.arm64.transports.device_package import package_for
from microvlm.backends.arm64.transports.worker_process import WorkerProcess
from microvlm.backends.arm64.worker_link import BrokenWorker, exchange
from microvlm.backends.emulation.progress import Progress
from microvlm.backends.emulation.sites import ensure_wheels, package_requirements, runtime_requirements
from microvlm.console import note
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.bundle import DOCUMENTS, open_bundle
from microvlm.formats.manifest import MANIFEST, sha256

WORKER_PACKAGES = ("numpy", "onnxruntime", "click", "safetensors", "msgspec")
"""Requirements of microvlm that the worker imports."""
PIECE_BYTES = 1 << 20
T = TypeVar("T")


class Delivery:
    """Talks to the installer in `process`; the `damaged` parts (BUNDLE, PACKAGES) are removed there and sent again.

    Methods raise UserError, and ConnectionLost when the connection breaks.
    """

    def __init__(self, process: WorkerProcess, place: str, report: Progress, damaged: Collection[str] = ()):
        self._process, self._place, self._report, self._damaged = process, place, report, damaged
        self._used: list[str] = []
        self._ids = 0
        self._device = self._ask(DevicePython, "look", packages=WORKER_PACKAGES)
        if self._device.bits != 64:
            raise UserError(f"{place} has a 32-bit system: install the 64-bit Raspberry Pi OS.")

    def packages(self) -> list[str]:
        """Copy microvlm and its requirements -> folders for the worker's path, below the device's cache."""
        machine = self._device.machine
        package = package_for(machine)
        folder = f"packages/{package.digest[:16]}"
        if not self._is_unpacked(folder):
            if package.no_library_reason:
                note(
                    f"{self._place} ({machine}) runs without the native library: {package.no_library_reason}"
                )
            # Other hosts may send other versions at the same time.
            name = f"{package.digest[:16]}.zip"
            self._put("wheels", name, package.content, "microvlm")
            self._request("unpack", folder=folder, files={f"wheels/{name}": package.digest})
        return [folder, *self._site()]

    def bundle(self, bundle: Path) -> str:
        """Copy the bundle -> its folder on the device."""
        manifest = open_bundle(bundle)
        manifest_bytes = (bundle / MANIFEST).read_bytes()
        digest = hashlib.sha256(manifest_bytes).hexdigest()
        folder = f"bundles/{digest[:16]}"
        if BUNDLE in self._damaged:
            self._request("remove", folder=folder)
        files = {
            name: (entry.bytes, entry.sha256)
            for name, entry in manifest.files.items()
            if name not in DOCUMENTS
        }
        files[MANIFEST] = (len(manifest_bytes), digest)
        if not self._send_files(folder, bundle, files, bundle.name):
            self._request("finish", folder=folder)
        self._used.append(folder)
        return f"{self._device.root}/{folder}"

    def start(self, path: list[str], arguments: list[str], environment: Mapping[str, str]) -> None:
        """Make the installer become the worker, whose greeting comes next."""
        self._ids += 1
        request = {"id": self._ids, "do": "start", "path": path, "arguments": arguments, "used": self._used}
        write_frame(self._process.requests, {**request, "environment": dict(environment)})

    def _is_unpacked(self, folder: str) -> bool:
        self._used.append(folder)
        if PACKAGES in self._damaged:
            self._request("remove", folder=folder)
        return self._ask(Exists, "exists", folder=folder).exists

    def _site(self) -> list[str]:
        """Copy the requirements that the device's Python lacks -> the folder there, or nothing."""
        machine = self._device.machine
        requirements = [each for each in runtime_requirements() if _name(each) in WORKER_PACKAGES]
        if all(_satisfied(name, self._device.versions.get(name)) for name in WORKER_PACKAGES):
            return []
        library, version = self._device.c_library
        if library != "glibc":
            raise UserError(
                f"{self._place} has no glibc, for which packages are built: install microvlm there, and name its "
                "Python with MICROVLM_DEVICE_PYTHON."
            )
        if not re.fullmatch(r"2\.\d{1,3}", version):
            raise UserError(
                f"{self._place} has glibc {documents.quote(version)}, whose packages are not known."
            )
        glibc = int(version.split(".")[1])
        folder = ensure_wheels(self._device.python, glibc, machine, requirements, self._report)
        wheels = sorted(folder.glob("*.whl"))
        digest = hashlib.sha256(json.dumps([path.name for path in wheels]).encode()).hexdigest()[:16]
        site = f"sites/{digest}"
        if not self._is_unpacked(site):
            files = {path.name: (path.stat().st_size, sha256(path)) for path in wheels}
            self._send_files("wheels", folder, files, "Python packages")
            self._request("unpack", folder=site, files={f"wheels/{name}": files[name][1] for name in files})
        return [site]

    def _send_files(self, folder: str, source: Path, files: dict[str, tuple[int, str]], label: str) -> bool:
        """Send the `files` {name: (bytes, sha256)} that are missing -> was the folder marked as complete before?"""
        answer = self._ask(Missing, "missing", folder=folder, files=files)
        missing = {name: size for name, size in answer.missing.items() if name in files}
        total, sent_bytes = sum(files[name][0] for name in missing), 0
        for name in sorted(missing, key=lambda name: (name == MANIFEST, name)):
            path = source / name
            size, digest = files[name]
            if sha256(path) != digest:
                raise UserError(f"{path} was altered: copy or export the bundle again.")
            with path.open("rb") as file:
                offset = missing[name] if missing[name] < size else 0
                file.seek(offset)
                while True:
                    piece = file.read(min(PIECE_BYTES, size - offset))
                    last = offset + len(piece) == size
                    if not piece and not last:
                        raise UserError(
                            f"{path} became shorter while it was copied: try again when nothing writes to it."
                        )
                    self._piece(folder, name, piece, offset, digest if last else "")
                    offset += len(piece)
                    sent_bytes += len(piece)
                    self._report(f"copying {label} to {self._place}", min(1.0, sent_bytes / max(1, total)))
                    if last:
                        break
        return answer.marked

    def _put(self, folder: str, name: str, content: bytes, label: str) -> None:
        self._report(f"copying {label} to {self._place}", 0)
        self._piece(folder, name, content, 0, hashlib.sha256(content).hexdigest())
        self._report(f"copying {label} to {self._place}", 1)

    def _piece(self, folder: str, name: str, data: bytes, offset: int, digest: str) -> None:
        tensor = Tensor("uint8", (len(data),), data)
        self._request("put", (tensor,), folder=folder, name=name, offset=offset, sha256=digest)

    def _ask(self, kind: type[T], action: str, **request: Any) -> T:
        """A request whose answer has the type `kind`."""
        return messages.parse(self._request(action, **request), kind, f"an answer of {self._place}")

    def _request(self, action: str, tensors: tuple[Tensor, ...] = (), **request: Any) -> dict[str, Any]:
        self._ids += 1
        try:
            return exchange(self._process, {"id": self._ids, "do": action, **request}, tensors)[0]
        except (FrameError, BrokenWorker, UserError) as error:
            self._process.end(patience_s=1)
            raise UserError(f"{self._place}: {error}") from None


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _satisfied(package: str, version: str | None) -> bool:
    """Is a version as new as microvlm requires?"""
    if version is None:
        return False
    for requirement in package_requirements():
        if _name(requirement) == package and "extra ==" not in requirement:
            oldest = re.search(r">=\s*([\d.]+)", requirement)
            return oldest is None or _numbers(version) >= _numbers(oldest[1])
    return True


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]
