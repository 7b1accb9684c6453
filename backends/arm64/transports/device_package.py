"""Packs microvlm into one file for a device: a given wheel, or a zip of the modules installed here.

The zip has the native library for the device's processor where it is installed here or a cross-compiler can build it.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import microvlm
from microvlm.backends import native
from microvlm.backends.emulation.cache import cached_folder
from microvlm.backends.emulation.sites import compile_bytecode
from microvlm.console import note
from microvlm.errors import UserError

SWITCH = "MICROVLM_WHEEL"
CROSS_COMPILER = "{machine}-linux-gnu-g++"
NATIVE = "microvlm/backends/native"
_EXCLUDED = ("training", "checkpoints", "evalset", "__pycache__")
_PHOTOGRAPHS = "photographs"
"""The folder of pictures whose decoding `microvlm-bench pi` counts; everything else that a device needs is modules."""
_SOURCES = (".cpp", ".h", ".txt", ".cmake")


class DevicePackage(NamedTuple):
    """A zip archive of microvlm; a wheel is one."""

    content: bytes
    no_library_reason: str
    """Why the archive has no native library, in a few words; empty where it has one."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def package_for(machine: str) -> DevicePackage:
    """The package for a machine as `uname -m` names it: $MICROVLM_WHEEL where it is set. Raises UserError."""
    wheel = os.environ.get(SWITCH)
    if wheel:
        return _wheel(Path(wheel).expanduser(), machine)
    library, no_library_reason = _library(machine)
    return DevicePackage(_zip(library, no_library_reason), no_library_reason)


def missing_library_reason(machine: str) -> str:
    """The `no_library_reason` of `package_for`, without compiling anything. Raises UserError."""
    wheel = os.environ.get(SWITCH)
    return _wheel(Path(wheel).expanduser(), machine).no_library_reason if wheel else _cannot_compile(machine)


def unpacked_package(machine: str) -> Path:
    """The package unpacked in the user's cache: a folder for a Python's path.

    Modules are compiled here, for this machine's version of Python: a program that compiles modules while it runs has
    another heap, and its count of instructions differs by tenths of a per cent from the next run's.
    """
    package = package_for(machine)
    if package.no_library_reason:
        note(f"without the native library: {package.no_library_reason}")

    def unpack(folder: Path) -> None:
        with zipfile.ZipFile(io.BytesIO(package.content)) as archive:
            archive.extractall(folder)
        compile_bytecode(folder, python)

    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return cached_folder("package", {"sha256": package.digest, "python": python}, unpack)


def _wheel(path: Path, machine: str) -> DevicePackage:
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise UserError(f"{SWITCH}={path} is not a wheel.")
    if not path.stem.endswith((f"_{machine}", "-any")):
        raise UserError(f"{SWITCH}={path.name} is a wheel for another machine than {machine}.")
    no_library_reason = "" if path.stem.endswith(machine) else f"{path.name} has none"
    return DevicePackage(path.read_bytes(), no_library_reason)


def _library(machine: str) -> tuple[bytes | None, str]:
    """-> (the native library or None, the reason why there is none)."""
    no_library_reason = _cannot_compile(machine)
    if no_library_reason:
        return None, no_library_reason
    folder = Path(native.__file__).resolve().parent
    if machine == platform.machine():
        return (folder / native.LIBRARY).read_bytes(), ""
    compiler = CROSS_COMPILER.format(machine=machine)
    sources = sorted(path for path in folder.rglob("*") if path.suffix in _SOURCES)
    digest = hashlib.sha256(
        b"".join(str(path.relative_to(folder)).encode() + path.read_bytes() for path in sources)
    )
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    recipe = {"machine": machine, "sources": digest.hexdigest(), "compiler": version}
    library_folder = cached_folder(
        "library", recipe, lambda out: compile_library(folder, out, machine, compiler)
    )
    return (library_folder / native.LIBRARY).read_bytes(), ""


def _cannot_compile(machine: str) -> str:
    """Why this installation neither has nor can compile a native library for `machine`; empty where it does."""
    folder = Path(native.__file__).resolve().parent
    if machine == platform.machine():
        return "" if (folder / native.LIBRARY).is_file() else "this package was installed without it"
    if not (folder / "CMakeLists.txt").is_file():
        return f"this package has it for {platform.machine()}, not {machine}; give a wheel with {SWITCH}"
    programs = (CROSS_COMPILER.format(machine=machine), "cmake")
    missing = next((program for program in programs if shutil.which(program) is None), None)
    return f"{missing} was not found" if missing else ""


def compile_library(sources: Path, out: Path, machine: str, compiler: str) -> None:
    """Build the native library from C++ sources with CMake, into the folder `out`. Raises UserError."""
    note(f"compiling the native library for {machine}, once")
    work = out.with_name("build")
    options = ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={machine}"]
    options += [f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_SHARED_LINKER_FLAGS=-s"]
    for command in (
        ["cmake", "-S", str(sources), "-B", str(work), *options],
        ["cmake", "--build", str(work), "--parallel", "2"],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"the native library could not be compiled for {machine}: {result.stderr[-300:]}")
    shutil.copyfile(work / native.LIBRARY, out / native.LIBRARY)


def _zip(library: bytes | None, no_library_reason: str) -> bytes:
    """Zip the installed modules; the same files give the same bytes, so that a hash names them."""
    root = Path(microvlm.__file__).parent
    entries = {f"microvlm/{name}": path.read_bytes() for name, path in _modules(root)}
    entries |= (
        {f"{NATIVE}/{native.LIBRARY}": library}
        if library
        else {f"{NATIVE}/{native.REASON}": no_library_reason.encode()}
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(entries):
            archive.writestr(zipfile.ZipInfo(name), entries[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    # In a checkout some sub-packages are links.
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in below if name not in _EXCLUDED]
        for name in names:
            if name.endswith(".py") or Path(folder).name == _PHOTOGRAPHS:
                path = Path(folder, name)
                yield str(path.relative_to(root)), path
