"""Whether a file is a whole native library of this package for this machine, found out before the system loads it.

To load a library is to run it: one that is cut off ends the process with a signal, and a foreign one runs its own code.
Our builds end with the SHA-256 of all bytes before it (`seal.cmake`).
"""

from __future__ import annotations

import hashlib
import platform
import re
import struct
from pathlib import Path

from microvlm.errors import UserError
from microvlm.formats.documents import read_file

MOST_BYTES = 64_000_000
"""A build for debuggers and sanitizers has some megabytes."""
SEAL = re.compile(rb"\nMicroVLM library sealed with sha256 ([0-9a-f]{64})\n\Z")
SEAL_BYTES = len(b"\nMicroVLM library sealed with sha256 \n") + 64
EXPORTS = (b"RegisterCustomOps", b"microvlm_active_variant")

_MACHINES = {3: "i686", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv"}
_OTHER_NAMES = {"AMD64": "x86_64", "arm64": "aarch64", "armv7l": "arm", "armv6l": "arm", "riscv64": "riscv"}


def library_problem(path: Path) -> str:
    """What keeps the file from being our library for this machine, in a few words; empty where nothing does."""
    try:
        content = read_file(path, MOST_BYTES)
    except FileNotFoundError:
        return "it does not exist"
    except UserError as error:
        return str(error).removesuffix(".")
    if not content:
        return "it is empty"
    machine = _elf_machine(content)
    if machine is None:
        return "it is not a library of Linux"
    here = _OTHER_NAMES.get(platform.machine(), platform.machine())
    if machine != here:
        return f"it is for {machine}, and this is {here}"
    if not all(name in content for name in EXPORTS):
        return "it is not a library of MicroVLM, or only the beginning of one"
    seal = SEAL.match(content, len(content) - SEAL_BYTES) if len(content) > SEAL_BYTES else None
    if seal is None:
        return "its end is missing, or another version of MicroVLM built it"
    if hashlib.sha256(memoryview(content)[:-SEAL_BYTES]).hexdigest().encode() != seal[1]:
        return "it is damaged: its bytes do not have the hash of its build"
    return ""


def _elf_machine(content: bytes) -> str | None:
    """Name of the machine that an ELF file is for; None for a file that is none."""
    if len(content) < 64 or content[:4] != b"\x7fELF" or content[5] not in (1, 2):
        return None
    (number,) = struct.unpack_from("<H" if content[5] == 1 else ">H", content, 18)
    return _MACHINES.get(number, f"machine {number}")
