"""This package for an emulated machine, as `ort-arm64` gives it to a device, and which compiler made its library.

`Package.site` is enough for a program that imports us; what looks for installed commands or backends needs a wheel.
"""

from __future__ import annotations

import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from microvlm.backends.arm64.transports.device_package import SWITCH, missing_library_reason, unpacked_package
from microvlm.backends.native import LIBRARY
from microvlm.errors import UserError

MACHINE = "aarch64"


@dataclass(frozen=True)
class Package:
    """The package as a folder or as a wheel, and the compiler of its library."""

    site: Path | None
    """A folder for an emulated Python's path, with the native library in it."""
    wheel: Path | None
    compiler: str
    """Compiler such as `clang 22.1.8`, the ziglang wheel's, which builds release wheels; empty without a library."""

    @property
    def contents(self) -> list[Path]:
        """Paths to give to `open_emulated_board` as packages."""
        return [path for path in (self.wheel, self.site) if path is not None]


def package_of_board() -> Package:
    """$MICROVLM_WHEEL, or what is installed here with a library compiled for aarch64. Raises UserError."""
    site = unpacked_package(MACHINE)
    library = site / "microvlm" / "backends" / "native" / LIBRARY
    return Package(site, None, compiler_of(library.read_bytes()) if library.is_file() else "")


def require_library() -> None:
    """Raises UserError, at once, where `package_of_board` would have no native library."""
    reason = missing_library_reason(MACHINE)
    if reason:
        raise UserError(
            f"counting instructions needs this package's native library for {MACHINE}: {reason}. Build an {MACHINE} "
            f"wheel in a checkout (bash .ci/nox -s wheels -- DIRECTORY) and set {SWITCH} to it, or run in a checkout "
            "with a cross-compiler (apt-get install g++-aarch64-linux-gnu cmake). --part equivalence does without."
        )


def from_wheel(wheel: Path) -> Package:
    """Raises UserError for a file that is not a wheel of this package with a native library."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/{LIBRARY}")]
            library = archive.read(names[0]) if names else b""
    except (OSError, zipfile.BadZipFile):
        raise UserError(f"{wheel} is not a wheel: build one with bash .ci/nox -s wheels.") from None
    if not library:
        raise UserError(f"{wheel} has no native library: build one with bash .ci/nox -s wheels.")
    return Package(None, wheel, compiler_of(library))


def wheel_of_board() -> Package:
    """$MICROVLM_WHEEL as a wheel. Raises UserError where it is not set."""
    wheel = os.environ.get(SWITCH)
    if not wheel:
        raise UserError(
            f"--part fit installs a wheel: set {SWITCH} to one for {MACHINE} (bash .ci/nox -s wheels)."
        )
    return from_wheel(Path(wheel).expanduser())


def compiler_of(library: bytes) -> str:
    """Compiler such as `clang 22.1.8` or `gcc 12.2.0`, from the .comment section of a library."""
    clang = re.search(rb"clang version ([\d.]+)", library)
    gcc = re.search(rb"GCC: \([^)]*\) ([\d.]+)", library)
    if clang:
        return f"clang {clang[1].decode()}"
    return f"gcc {gcc[1].decode()}" if gcc else "unknown"
