"""Folders of aarch64 Python packages, which this machine's pip installs from wheels, for an emulated PYTHONPATH."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from microvlm.backends.emulation.cache import cached_folder
from microvlm.backends.emulation.progress import Progress
from microvlm.errors import UserError

OLDEST_GLIBC = 17


def ensure_site(
    sysroot: Path, requirements: Sequence[str], report: Progress, dependencies: bool = True
) -> Path:
    """The folder with `requirements` (as pip takes them, paths of wheels too) for the Python of `sysroot`.

    The recipe has a wheel's content, so a rebuilt wheel is installed again, and this machine's version of Python, which
    decides whether the folder can be compiled. pip resolves environment markers for this machine. Raises UserError.
    """
    python, glibc = python_version(sysroot), glibc_minor(sysroot)
    recipe = {
        "python": python,
        "compiled": platform.python_version(),
        "glibc": glibc,
        "requirements": {each: _digest(each) for each in sorted(requirements)},
        "dependencies": dependencies,
    }
    return cached_folder("site", recipe, lambda folder: _install(folder, recipe, report))


def ensure_wheels(
    python: str, glibc: int, machine: str, requirements: Sequence[str], report: Progress
) -> Path:
    """A folder of wheels, with what they depend on, for a Linux machine with that Python and glibc 2.`glibc`.

    For a machine that installs nothing itself: a wheel is a zip archive of modules. Raises UserError.
    """
    recipe = {
        "python": python,
        "glibc": glibc,
        "machine": machine,
        "requirements": dict.fromkeys(sorted(requirements), ""),
    }

    def download(folder: Path) -> None:
        report("Python packages for the device", 0)
        _pip(["download", "--dest", str(folder)], recipe)
        report("Python packages for the device", 1)

    return cached_folder("wheels", recipe, download)


def package_requirements() -> list[str]:
    """Requirements of the installed package, extras included. Raises UserError in a checkout that is not installed."""
    try:
        return importlib.metadata.requires("microvlm") or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "microvlm is not installed here, only its folder is: run pip install -e . there."
        ) from None


def runtime_requirements(*extras: str) -> list[str]:
    """Requirements of microvlm and of `extras`, pinned to the versions that are installed here."""
    pinned = []
    for requirement in package_requirements():
        extra = re.search(r"extra == [\"'](.+?)[\"']", requirement)
        if extra is not None and extra[1] not in extras:
            continue
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        try:
            pinned.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pinned.append(requirement)
    return pinned


def python_version(sysroot: Path) -> str:
    """The Python version of a tree, as in `3.11`. Raises UserError for a tree without Python."""
    for program in sorted((sysroot / "usr" / "bin").glob("python3.*")):
        version = re.fullmatch(r"python(3\.\d+)", program.name)
        if version:
            return version[1]
    raise UserError(f"{sysroot} has no Python: remove it, and it is built again.")


def glibc_minor(sysroot: Path) -> int:
    """36 for glibc 2.36: the newest symbol version that the tree's libc defines. pip chooses wheels by it."""
    library = next(sysroot.glob("lib/aarch64-linux-gnu/libc.so.6"), None)
    if library is None:
        raise UserError(f"{sysroot} has no C library: remove it, and it is built again.")
    return max(int(minor) for minor in re.findall(rb"\0GLIBC_2\.(\d+)(?=\0)", library.read_bytes()))


def _install(folder: Path, recipe: dict, report: Progress) -> None:
    step = "emulated Python: installing packages"
    report(step, 0)
    options = ["--target", str(folder), "--no-compile", *([] if recipe["dependencies"] else ["--no-deps"])]
    _pip(["install", *options], {**recipe, "machine": "aarch64"})
    compile_bytecode(folder, recipe["python"])
    report(step, 1)


def compile_bytecode(folder: Path, python: str) -> None:
    """Compile the modules of a folder where this machine has the emulated Python's version: a second, not a minute.

    With another version the emulated Python compiles modules when it first imports them: the first count of
    instructions in a new folder then differs from the next one's by tenths of a per cent.
    """
    if f"{sys.version_info[0]}.{sys.version_info[1]}" == python:
        # Checked by hash, because pip keeps no file times.
        compile_all = [sys.executable, "-m", "compileall", "-qq", "--invalidation-mode", "unchecked-hash"]
        subprocess.run([*compile_all, str(folder)], check=False)


def compile_library(root: Path) -> None:
    """Compile the standard library of a tree of packages, as Debian does when it installs Python."""
    python = python_version(root)
    compile_bytecode(root / "usr" / "lib" / f"python{python}", python)


def _pip(command: list[str], recipe: dict) -> None:
    """Run pip for another machine, with wheels only. Raises UserError."""
    machine = recipe["machine"]
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(recipe["glibc"], OLDEST_GLIBC - 1, -1)]
    platforms += [f"manylinux2014_{machine}", f"linux_{machine}"]
    line = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *command]
    line += ["--only-binary=:all:", "--implementation=cp", f"--python-version={recipe['python']}"]
    line += [f"--platform={name}" for name in platforms]
    result = subprocess.run([*line, *recipe["requirements"]], capture_output=True, text=True)
    if result.returncode:
        errors = re.findall(r"^(?:ERROR: )?(.*)$", result.stderr.strip(), re.M)
        raise UserError(f"pip could not install packages for {machine}: {errors[-1].rstrip('.')}.")


def _digest(requirement: str) -> str:
    if not requirement.endswith(".whl"):
        return ""
    return hashlib.sha256(Path(os.path.expanduser(requirement)).read_bytes()).hexdigest()
