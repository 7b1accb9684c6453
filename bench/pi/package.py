"""This package for an emulated machine, as `ort-arm64` gives it to a device, and which compiler made its library."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from microvlm.backends.arm64.package import unpacked_package
from microvlm.backends.native import LIBRARY

MACHINE = "aarch64"


@dataclass(frozen=True)
class Package:
    """A folder for an emulated Python's path, with the native library in it."""

    site: Path
    compiler: str
    """As in `clang 22.1.8`, the ziglang wheel's, that release wheels are built with; empty without a library."""


def package_of_board() -> Package:
    """$MICROVLM_WHEEL, or what is installed here with a library compiled for aarch64. Raises UserError."""
    site = unpacked_package(MACHINE)
    library = site / "microvlm" / "backends" / "native" / LIBRARY
    return Package(site, compiler_of(library.read_bytes()) if library.is_file() else "")


def compiler_of(library: bytes) -> str:
    """As in `clang 22.1.8` or `gcc 12.2.0`: what compilers leave in a library's .comment."""
    clang = re.search(rb"clang version ([\d.]+)", library)
    gcc = re.search(rb"GCC: \([^)]*\) ([\d.]+)", library)
    if clang:
        return f"clang {clang[1].decode()}"
    return f"gcc {gcc[1].decode()}" if gcc else "unknown"
