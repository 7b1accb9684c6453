"""This package for the emulated machine: an aarch64 wheel, or the Python that runs here beside a library built for it.

A library is built from a checkout's sources by the compiler of the ziglang wheel, as release wheels are, or by a cross
GCC; by which one is read from the library itself.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import microvlm
from microvlm.backends.emulation.cache import cached_folder
from microvlm.backends.native import LIBRARY
from microvlm.bench import a53
from microvlm.errors import UserError

CROSS_COMPILER = f"{a53.CROSS}g++"
TOOLCHAIN = a53.REPOSITORY / ".ci" / "zig.cmake"


@dataclass(frozen=True)
class Package:
    """Where the emulated Python finds us."""

    site: Path | None
    """A folder for its path, or None where `wheel` has to be installed."""
    wheel: Path | None
    library: Path | None
    """The native library, where it is not in the wheel."""
    compiler: str
    """As in `clang 22.1.8`; empty without a library."""

    def environment(self) -> dict[str, str]:
        """What the emulated process must see to find the library. Bytecode of this machine's Python is left alone."""
        if self.wheel is not None:
            return {}
        return {"MICROVLM_NATIVE": str(self.library or 0), "PYTHONDONTWRITEBYTECODE": "1"}


def from_wheel(wheel: Path) -> Package:
    """Raises UserError for a file that is no wheel of ours for aarch64."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/{LIBRARY}")]
            library = archive.read(names[0]) if names else b""
    except (OSError, zipfile.BadZipFile):
        raise UserError(f"{wheel} is no wheel: build one with bash .ci/nox -s wheels.") from None
    if not library:
        raise UserError(f"{wheel} has no native library: build one with bash .ci/nox -s wheels.")
    return Package(None, wheel, None, compiler_of(library))


def from_here() -> Package:
    """The package that runs here, and a library built from its checkout. Raises UserError, saying what is missing."""
    library = build_library()
    return Package(link_package(), None, library, compiler_of(library.read_bytes()))


def without_library() -> Package:
    """The package that runs here on the graphs' function bodies."""
    return Package(link_package(), None, None, "")


def link_package() -> Path:
    """A folder that holds a link to the installed package and nothing else of this machine's Python."""
    package = Path(microvlm.__file__).resolve().parent
    if not (package / "bench" / "pi").is_dir():
        package = Path(microvlm.__file__).parent

    def link(folder: Path) -> None:
        (folder / "microvlm").symlink_to(package)

    return cached_folder("package", {"path": str(package)}, link)


def build_library() -> Path:
    """The aarch64 library of this checkout's sources, kept by their content. Raises UserError."""
    reason = a53.missing("cmake")
    if reason:
        raise UserError(f"{reason.rstrip('.')}; or give --wheel with an aarch64 wheel of this package.")
    digest = hashlib.sha256()
    for source in sorted(a53.KERNELS.iterdir()):
        if source.suffix in (".cpp", ".h", ".txt"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    options, environment, compiler = _compiler()
    recipe = {"sources": digest.hexdigest(), "compiler": compiler}

    def build(folder: Path) -> None:
        work = folder.with_name("build")
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        _run(["cmake", "-S", str(a53.KERNELS), "-B", str(work), *generator, *options], environment)
        _run(["cmake", "--build", str(work), "--parallel", "2"], environment)
        shutil.copyfile(work / LIBRARY, folder / LIBRARY)

    return cached_folder("library", recipe, build) / LIBRARY


def compiler_of(library: bytes) -> str:
    """As in `clang 22.1.8` or `gcc 12.2.0`: what compilers leave in a library's .comment."""
    clang = re.search(rb"clang version ([\d.]+)", library)
    gcc = re.search(rb"GCC: \([^)]*\) ([\d.]+)", library)
    if clang:
        return f"clang {clang[1].decode()}"
    return f"gcc {gcc[1].decode()}" if gcc else "unknown"


def _compiler() -> tuple[list[str], dict[str, str], str]:
    """CMake's options, the environment and a name. The one of release wheels where it is installed."""
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_SHARED_LINKER_FLAGS=-s"]
    if importlib.util.find_spec("ziglang") and TOOLCHAIN.is_file():
        zig = {"MICROVLM_ZIG_PYTHON": sys.executable, "MICROVLM_MACHINE": "aarch64"}
        version = importlib.metadata.version("ziglang")
        return [*options, f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}"], {**os.environ, **zig}, f"zig {version}"
    if shutil.which(CROSS_COMPILER) is None:
        raise UserError("no compiler for aarch64 is here: pip install ziglang, or give --wheel.")
    options += ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    named = subprocess.run(
        [CROSS_COMPILER, "-dumpfullversion"], capture_output=True, text=True
    ).stdout.strip()
    return [*options, f"-DCMAKE_CXX_COMPILER={CROSS_COMPILER}"], dict(os.environ), f"gcc {named}"


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
        raise UserError(
            f"the aarch64 library cannot be built: {said[0] if said else done.stderr.strip()[-200:]}."
        )
