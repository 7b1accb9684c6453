"""Finds and loads the native library of `ai.microvlm` kernels, and lists its variants. README.md describes the sources.

Imports neither ONNX Runtime nor torch. A package may lack the library: functions then raise UserError. Environment:
MICROVLM_NATIVE=0 switches the library off, or is the path of another one; MICROVLM_KERNELS forces a variant by name.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from microvlm.backends.native.library_file import library_problem
from microvlm.errors import UserError
from microvlm.formats.documents import quote

LIBRARY = "libmicrovlm_ops.so"
SWITCH = "MICROVLM_NATIVE"
REASON = "not_built.txt"
"""The file that a build without the library leaves in its place: one line with the reason."""
INTERFACE = 2
"""The number in `c_api.cpp` of the exports and operators that this version calls."""


def library_path() -> Path | None:
    """The library to use, checked and loaded; None where this package has none or MICROVLM_NATIVE=0.

    Raises UserError when MICROVLM_NATIVE names something else than a library of this version for this machine.
    """
    switch = os.environ.get(SWITCH, "")
    if switch == "0":
        return None
    if switch not in ("", "1"):
        if not os.path.isfile(switch):
            raise UserError(
                f"{SWITCH}={quote(switch)} is neither 0 nor a library: give 0, 1 or the path of {LIBRARY}."
            )
        path = Path(switch).resolve()
        problem = _load_problem(path)
        if problem:
            raise UserError(
                f"the native library {quote(path)} cannot be loaded ({problem}): set {SWITCH} to 0, 1 or the path of "
                f"this version's {LIBRARY}."
            )
        return path
    path = Path(__file__).with_name(LIBRARY).resolve()
    problem = _load_problem(path) if path.is_file() else ""
    if path.is_file() and not problem:
        return path
    if switch == "1" and problem:
        raise UserError(
            f"the native library {path} cannot be loaded ({problem}): install microvlm again for this machine."
        )
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
    loaded, _ = _load(path, *_version_of(path))
    assert loaded is not None  # library_path checked it
    return loaded


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


def _load_problem(path: Path) -> str:
    """Why the library cannot be used (damaged, for another machine), in a few words; empty where it can."""
    return _load(path, *_version_of(path))[1]


def _version_of(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced; zeros where it cannot be read."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.cache
def _load(path: Path, *_version: int) -> tuple[ctypes.CDLL | None, str]:
    """-> (the library or None, why not)."""
    problem = library_problem(path)
    if problem:
        return None, problem
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.microvlm_interface.restype = ctypes.c_int64
        if loaded.microvlm_interface() != INTERFACE:
            return None, "another version of MicroVLM built it"
        loaded.microvlm_variant_count.restype = ctypes.c_int64
        loaded.microvlm_variant_name.restype = ctypes.c_char_p
        loaded.microvlm_variant_name.argtypes = [ctypes.c_int64]
        loaded.microvlm_active_variant.restype = ctypes.c_char_p
        loaded.microvlm_active_variant.argtypes = [ctypes.POINTER(ctypes.c_char_p)]
    except OSError as error:
        return None, str(error)
    except AttributeError:
        return None, "another version of MicroVLM built it"
    return loaded, ""
