"""Finds and loads the native library of `ai.microvlm` kernels, and lists its variants. README.md describes the sources.

Imports neither ONNX Runtime nor torch. A package may lack the library: functions then raise UserError. Environment:
MICROVLM_NATIVE=0 switches the library off, or is the path of another one; MICROVLM_KERNELS forces a variant by name.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from microvlm.errors import UserError

LIBRARY = "libmicrovlm_ops.so"
SWITCH = "MICROVLM_NATIVE"
REASON = "not_built.txt"
"""The file that a build without the library leaves in its place: one line with the reason."""


def library_path() -> Path | None:
    """The library to use; None where this package has none or MICROVLM_NATIVE=0. Raises UserError."""
    switch = os.environ.get(SWITCH, "")
    if switch == "0":
        return None
    if switch not in ("", "1"):
        path = Path(switch)
        if not path.is_file():
            raise UserError(
                f"{SWITCH}={switch} is neither 0 nor a library: give 0, 1 or the path of {LIBRARY}."
            )
        return path.resolve()
    path = Path(__file__).with_name(LIBRARY)
    if path.is_file() and (switch == "1" or not _load_problem(path.resolve())):
        return path.resolve()
    if switch == "1":
        raise UserError(
            f"{SWITCH}=1, but this package was installed without {LIBRARY}: install a wheel that has it, or install "
            "from source where CMake and a C++ compiler are."
        )
    return None


def absence() -> str:
    """The reason, in a few words, for a missing library; empty where there is one or MICROVLM_NATIVE is set."""
    if os.environ.get(SWITCH, ""):
        return ""
    path = Path(__file__).with_name(LIBRARY)
    if path.is_file():
        return _load_problem(path.resolve())
    path = Path(__file__).with_name(REASON)
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def library() -> ctypes.CDLL:
    """The library with its C exports (`c_api.cpp`). Raises UserError where there is none."""
    path = library_path()
    if path is None:
        raise UserError(f"there is no native library here ({LIBRARY} is missing or {SWITCH}=0).")
    return _open(path)


def variants() -> list[str]:
    """Names of the variants that run on this processor, best first, `reference` last. Raises UserError."""
    loaded = library()
    return [loaded.microvlm_variant_name(i).decode() for i in range(loaded.microvlm_variant_count())]


def active_variant() -> str:
    """Name of the variant in use: MICROVLM_KERNELS where it is set, else the best. Raises UserError."""
    problem = ctypes.c_char_p()
    name = library().microvlm_active_variant(ctypes.byref(problem))
    if name is None:
        raise UserError(f"{(problem.value or b'').decode()}.")
    return name.decode()


@functools.cache
def _load_problem(path: Path) -> str:
    """Why this system cannot load the library (older C library, another machine); empty where it can."""
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return str(error)
    return ""


@functools.cache
def _open(path: Path) -> ctypes.CDLL:
    try:
        opened = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"the native library {path} cannot be loaded ({error}).") from error
    opened.microvlm_variant_count.restype = ctypes.c_int64
    opened.microvlm_variant_name.restype = ctypes.c_char_p
    opened.microvlm_variant_name.argtypes = [ctypes.c_int64]
    opened.microvlm_active_variant.restype = ctypes.c_char_p
    opened.microvlm_active_variant.argtypes = [ctypes.POINTER(ctypes.c_char_p)]
    return opened
