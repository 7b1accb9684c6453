"""Runs llvm-mca over many sequences of instructions at once. Measures nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence

CPU = "cortex-a53"
PROGRAM = "llvm-mca"
_QUIET = ("-instruction-info=0", "-resource-pressure=0")
_TARGET = re.compile(r"(?<!#)\b0x[0-9a-f]+$")
"""An address, as `objdump` writes the target of a branch."""
_CALL = re.compile(r"bl\s.*")


def version() -> str | None:
    """Such as `14.0.6`; None where llvm-mca is not installed."""
    if shutil.which(PROGRAM) is None:
        return None
    text = subprocess.run([PROGRAM, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"LLVM version (\S+)", text)
    return "unknown" if found is None else found[1]


def total_cycles(sequences: Sequence[Sequence[str]], iterations: int = 1) -> list[int] | None:
    """Cycles until each sequence has finished, repeated `iterations` times; None where llvm-mca refuses one of them.

    Sequences are lines as `objdump` writes them; where a branch goes does not matter.
    """
    if not sequences:
        return []
    regions = "".join(
        "# LLVM-MCA-BEGIN\n" + "".join(f"{_assembly(line)}\n" for line in lines) + "# LLVM-MCA-END\n"
        for lines in sequences
    )
    command = [PROGRAM, "-mtriple=aarch64", f"-mcpu={CPU}", f"-iterations={iterations}", *_QUIET]
    process = subprocess.run(command, input=regions, capture_output=True, text=True)
    cycles = [int(number) for number in re.findall(r"^Total Cycles:\s+(\d+)$", process.stdout, re.M)]
    return cycles if process.returncode == 0 and len(cycles) == len(sequences) else None


def _assembly(line: str) -> str:
    """A call is a branch here: llvm-mca takes a hundred cycles for what is called."""
    return re.sub(r"^blr\b", "br", _CALL.sub("b 0", _TARGET.sub("0", line.strip())))
