"""Runs on a device before anything of ours is there: takes files, looks at Python, then becomes the worker.

Standard library alone; its source and that of frames.py travel in the command line. Everything lies below one folder of
the user's cache, each thing under the hash of its content, and is complete where it has its final name.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from microvlm.backends.arm64.frames import GREETING, Garbled, Lost, read_frame, write_frame

KEPT_DAYS = 60
"""What was not used for this long goes when something new comes."""
KINDS = ("bundles", "packages", "sites", "wheels")


def cache_root() -> Path:
    """$MICROVLM_CACHE/device, or that below the user's cache."""
    chosen = os.environ.get("MICROVLM_CACHE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(chosen) if chosen else cache / "microvlm") / "device"


class Installer:
    """Answers requests; each method is one."""

    def __init__(self, root: Path):
        self.root = root

    def look(self, request: dict[str, Any], _: list) -> dict[str, Any]:
        """What Python there is: version, machine, C library, versions of `packages`."""
        versions: dict[str, str | None] = {}
        for name in request["packages"]:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = None
        return {
            "python": ".".join(map(str, sys.version_info[:2])),
            "machine": platform.machine(),
            "bits": sys.maxsize.bit_length() + 1,
            "c_library": list(platform.libc_ver()),
            "versions": versions,
        }

    def missing(self, request: dict[str, Any], _: list) -> dict[str, Any]:
        """Which of `files` {name: bytes} are not in `folder`, and how many bytes of each have come already."""
        folder = self._below(request["folder"])
        absent = {}
        for name, size in request["files"].items():
            path = self._below(request["folder"], name)
            if not path.is_file() or path.stat().st_size != size:
                part = _part(path)
                absent[name] = min(part.stat().st_size, size) if part.is_file() else 0
        if folder.is_dir():
            os.utime(folder)
        return {"missing": absent}

    def put(self, request: dict[str, Any], tensors: list) -> dict[str, Any]:
        """A piece of a file at `offset`; the last one has the `sha256` of the whole."""
        path = self._below(request["folder"], request["name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _part(path)
        with part.open("r+b" if request["offset"] and part.exists() else "wb") as file:
            file.seek(request["offset"])
            file.write(tensors[0].data)
            file.truncate()
        if request.get("sha256"):
            with part.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != request["sha256"]:
                part.unlink()
                raise OSError(errno.EIO, "the file came with another hash than it was sent with", str(path))
            os.replace(part, path)
        return {}

    def unpack(self, request: dict[str, Any], _: list) -> dict[str, Any]:
        """The zip archives `files` into `folder`, unless it is there; they are removed."""
        folder = self._below(request["folder"])
        if not folder.is_dir():
            self._remove_old()
            aside = folder.with_name(f".{folder.name}.{os.getpid()}")
            try:
                for name in request["files"]:
                    with zipfile.ZipFile(self._below(name)) as archive:
                        archive.extractall(aside)
                os.rename(aside, folder)
            except OSError:
                # Another host may have been first, with the same content.
                if not folder.is_dir():
                    raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        for name in request["files"]:
            self._below(name).unlink(missing_ok=True)
        return {}

    def exists(self, request: dict[str, Any], _: list) -> dict[str, Any]:
        """Whether `folder` was unpacked; being asked about counts as being used."""
        folder = self._below(request["folder"])
        there = folder.is_dir()
        if there:
            os.utime(folder)
        return {"exists": there}

    def start(self, request: dict[str, Any], _: list) -> dict[str, Any]:
        """Become the worker, with `path` for modules. Does not return."""
        path = os.pathsep.join(str(self._below(folder)) for folder in request["path"])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **request["environment"]}
        os.execve(sys.executable, [sys.executable, *request["arguments"]], environment)

    def _below(self, *names: str) -> Path:
        path = self.root.joinpath(*names)
        if ".." in path.parts or not path.is_relative_to(self.root):
            raise OSError(errno.EPERM, "outside of the cache", str(path))
        return path

    def _remove_old(self) -> None:
        oldest = time.time() - KEPT_DAYS * 86400
        for kind in KINDS:
            for path in (self.root / kind).glob("*"):
                if path.stat().st_mtime < oldest:
                    shutil.rmtree(path, ignore_errors=True)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _sentence(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left on the device's disk{where}: free some."
    return f"the device could not do it: {error.strerror or error}{where}."


def main() -> None:
    requests, answers = (os.fdopen(number, mode, 0, closefd=False) for number, mode in ((0, "rb"), (1, "wb")))
    answers.write(GREETING + b"\n")
    root = cache_root()
    installer = Installer(root)
    while True:
        try:
            request, tensors = read_frame(requests)
            try:
                answer = getattr(installer, request["do"])(request, tensors)
            except OSError as error:
                answer = {"error": _sentence(error)}
            except zipfile.BadZipFile as error:
                answer = {"error": f"an archive is damaged on the device ({error}): try again."}
            write_frame(answers, {"id": request["id"], "root": str(root), **answer})
        except Lost:
            return
        except Garbled as garbled:
            write_frame(answers, {"id": None, "error": f"the device could not read a request: {garbled}"})
            return


if __name__ == "__main__":
    main()
