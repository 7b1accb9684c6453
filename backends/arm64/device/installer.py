"""Runs on a device where microvlm is not installed: receives files, reports Python's version, then becomes the worker.

Imports the standard library alone; its source and that of frames.py travel in the command line. Files lie below one
folder of the user's cache, in folders named by the hash of their content. A complete folder has a mark, written when
all of it is on the disk: after a power cut a file may keep its size and lose its last bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
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

from microvlm.backends.arm64.frames import GREETING, ConnectionLost, FrameError, read_frame, write_frame

KEPT_DAYS = 60
"""Folders unused for this long are removed when something new is sent, unless a worker holds them."""
MARK = ".whole"
"""The file in a complete folder with its number of files and bytes."""
REQUESTS = ("look", "missing", "put", "finish", "unpack", "exists", "remove", "start")
REMEDY = "use the same microvlm on both sides"
KINDS = ("bundles", "packages", "sites", "wheels")


def cache_root() -> Path:
    """$MICROVLM_CACHE/device, else microvlm/device below the user's cache.

    Raises OSError for a user without a home, as an unknown one in a container is.
    """
    configured = os.environ.get("MICROVLM_CACHE")
    if configured:
        return Path(os.path.abspath(configured)) / "device"
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        cache = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(cache):
        raise OSError(errno.ENOENT, "its user has no home folder; set MICROVLM_CACHE there")
    return Path(cache) / "microvlm" / "device"


class Installer:
    """Answers requests; each public method is one."""

    def __init__(self, root: Path):
        self.root = root

    def look(self, request: dict[str, Any], _: list) -> dict[str, Any]:
        """Describe the device's Python: version, machine, C library, versions of `packages`."""
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
        """List the `files` {name: [bytes, sha256]} that `folder` lacks, with how many bytes of each have come already.

        Checks hashes where the folder has no mark, and removes the mark where a file is missing. Counts as a use.
        """
        folder = self._below(request["folder"])
        marked = (folder / MARK).is_file()
        if folder.is_dir():
            os.utime(folder)
        absent = {}
        for name, (size, digest) in request["files"].items():
            path = self._below(request["folder"], name)
            part = _part(path)
            for file in (path, part):
                # Wheels have no folder of their own.
                if file.exists() and not marked:
                    os.utime(file)
            if not path.is_file() or path.stat().st_size != size or not (marked or _sha256(path) == digest):
                absent[name] = min(part.stat().st_size, size) if part.is_file() else 0
        if absent:
            (folder / MARK).unlink(missing_ok=True)
            self._remove_old()
        return {"missing": absent, "marked": marked and not absent}

    def put(self, request: dict[str, Any], tensors: list) -> dict[str, Any]:
        """Write a piece of a file at `offset`; the last piece comes with the `sha256` of the file."""
        path = self._below(request["folder"], request["name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _part(path)
        with part.open("r+b" if request["offset"] and part.exists() else "wb") as file:
            file.seek(request["offset"])
            file.write(tensors[0].data)
            file.truncate()
        if request.get("sha256"):
            if _sha256(part) != request["sha256"]:
                part.unlink()
                raise OSError(errno.EIO, "the file's hash changed on the way", str(path))
            _flush(part)
            os.replace(part, path)
            _flush(path.parent)
        return {}

    def finish(self, request: dict[str, Any], _: list) -> dict[str, Any]:
        """Mark `folder` as complete; `missing` or `put` have checked its files."""
        _mark(self._below(request["folder"]))
        return {}

    def unpack(self, request: dict[str, Any], _: list) -> dict[str, Any]:
        """Unpack the zip archives `files` {name: sha256} into `folder` where it is not complete, and remove them."""
        folder = self._below(request["folder"])
        if not _is_whole(folder):
            self._remove_old()
            temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
            try:
                for name, digest in request["files"].items():
                    with self._below(name).open("rb") as file:
                        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                            raise zipfile.BadZipFile(f"{name} has another hash")
                        with zipfile.ZipFile(file) as archive:
                            archive.extractall(temporary)
                _mark(temporary)
                if not _is_whole(folder):
                    _remove(folder)
                os.rename(temporary, folder)
                _flush(folder.parent)
            except zipfile.BadZipFile:
                self._below(name).unlink(missing_ok=True)
                raise
            except OSError:
                # Another host may have been first, with the same content.
                if not _is_whole(folder):
                    raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        for name in request["files"]:
            self._below(name).unlink(missing_ok=True)
        return {}

    def exists(self, request: dict[str, Any], _: list) -> dict[str, Any]:
        """Tell whether `folder` is unpacked with all of its files, and mark it as used now."""
        folder = self._below(request["folder"])
        exists = _is_whole(folder)
        if exists:
            os.utime(folder)
        return {"exists": exists}

    def remove(self, request: dict[str, Any], _: list) -> dict[str, Any]:
        """Remove `folder`, which a worker found damaged."""
        _remove(self._below(request["folder"]))
        return {}

    def start(self, request: dict[str, Any], _: list) -> dict[str, Any]:
        """Become the worker, with `path` for modules, and lock the folders `used` for its life. Does not return."""
        for folder in request["used"]:
            with contextlib.suppress(OSError):  # a file system without locks
                descriptor = os.open(self._below(folder), os.O_RDONLY)
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                os.set_inheritable(descriptor, True)
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
                with contextlib.suppress(OSError):  # a worker holds it, or another host removes it too
                    if path.stat().st_mtime < oldest:
                        _remove_unheld(path)


def _remove_unheld(path: Path) -> None:
    """Remove a file or folder. Raises OSError where a worker holds it."""
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    finally:
        os.close(file)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _mark(folder: Path) -> None:
    """Write the mark once everything in `folder` is on the disk."""
    os.sync()  # thousands of files: one by one takes minutes on an SD card
    (folder / MARK).write_text(_measure(folder))
    _flush(folder / MARK)
    _flush(folder)


def _is_whole(folder: Path) -> bool:
    mark = folder / MARK
    return mark.is_file() and mark.read_text(errors="replace") == _measure(folder)


def _measure(folder: Path) -> str:
    """Number of files and bytes below `folder`, without the mark and bytecode, which Python adds."""
    sizes = [
        os.lstat(os.path.join(place, name)).st_size
        for place, _, names in os.walk(folder)
        if os.path.basename(place) != "__pycache__"
        for name in names
        if name != MARK
    ]
    return f"{len(sizes)} files, {sum(sizes)} bytes"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _sentence(error: OSError) -> str:
    filename_note = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left on the device's disk{filename_note}: free some."
    return f"the device could not do it: {error.strerror or error}{filename_note}."


def main() -> None:
    requests, answers = (os.fdopen(number, mode, 0, closefd=False) for number, mode in ((0, "rb"), (1, "wb")))
    answers.write(GREETING + b"\n")
    root = None
    while True:
        try:
            request, tensors = read_frame(requests)
            try:
                if request.get("do") not in REQUESTS:
                    raise KeyError("do")
                root = root or cache_root()
                answer = getattr(Installer(root), request["do"])(request, tensors)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                problem = f"{type(error).__name__}: {error}"[:200]
                answer = {"error": f"the device got a malformed request ({problem}): {REMEDY}."}
            except OSError as error:
                answer = {"error": _sentence(error)}
            except zipfile.BadZipFile as error:
                answer = {"error": f"an archive is damaged on the device ({error}): try again."}
            write_frame(answers, {"id": request.get("id"), "root": str(root or ""), **answer})
        except ConnectionLost:
            return
        except FrameError as garbled:
            write_frame(answers, {"id": None, "error": f"the device could not read a request: {garbled}"})
            return


if __name__ == "__main__":
    main()
