"""Runs programs on an emulated board and counts every instruction, by QEMU with a plugin.

One thread, fixed addresses, hashes and random bytes, no memory returned to the system, no telemetry, and a clock that
advances by the call: two runs of one program from the same folders agree to the last instruction. ONNX Runtime reads
the time in each run and libraries draw keys of hash tables; with real ones the heap came to lie differently.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from microvlm.backends.emulation import DEFAULT_CPU, EmulatedMachine, open_machine, runtime_requirements
from microvlm.backends.emulation.cache import cached_folder
from microvlm.bench.kernels import cortex_a53
from microvlm.bench.pi.counting.emulated_package import Package
from microvlm.bench.pi.counting.kernel_cycles import LISTING, Step, parse_steps
from microvlm.errors import UserError
from microvlm.formats import documents

COUNTING_EMULATOR = "qemu-aarch64"
"""The static one loads no plugin."""
SOURCES = Path(__file__).parent / "sources"
PLUGIN, CLOCK = "instruction_count", "constant_clock"
"""C sources there, each built as a shared library for this machine."""
QUIET = {
    "PYTHONHASHSEED": "0",
    # Modules that nobody has compiled are compiled each time, and not only the first.
    "PYTHONDONTWRITEBYTECODE": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    # Memory that comes from and goes back to the system at different moments costs tenths of a per cent.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_TOP_PAD_": "67108864",
}

T = TypeVar("T")


class IllegalInstruction(Exception):
    """The emulated CPU lacks an instruction that the program executed. The message is a sentence."""


@dataclass(frozen=True)
class Region:
    """Executed instructions between two marks."""

    total: int
    simd: int
    multiply: int
    crypto: int
    library: int
    """Instructions executed in the native library."""
    steps: tuple[Step, ...] = ()
    """What it executed there, where the mark asked for a list."""


def open_board(package: Package, cpu: str = DEFAULT_CPU) -> EmulatedMachine:
    """An emulated machine with this package and what it needs to run; what is missing is built. Raises UserError."""
    wheels = [] if package.wheel is None else [package.wheel]
    machine = open_machine(cpu, runtime_requirements(), wheels)
    return machine if package.site is None else replace(machine, sites=(package.site, *machine.sites))


def require_emulator() -> str:
    """The program that counts. Raises UserError where it, or the compiler of its plugin, is missing."""
    emulator = shutil.which(COUNTING_EMULATOR)
    if emulator is None:
        raise UserError("QEMU that loads plugins was not found: apt-get install qemu-user.")
    if shutil.which("cc") is None:
        raise UserError("no C compiler was found to build the counter with: apt-get install gcc.")
    return emulator


def count(
    machine: EmulatedMachine,
    arguments: Sequence[str],
    kind: type[T],
    extra: dict[str, str] | None = None,
) -> tuple[T, dict[int, Region]]:
    """Run the emulated Python with `arguments` -> the JSON document, of type `kind`, in the last line that it prints,
    and the counts by region.

    Raises UserError where QEMU or a C compiler is missing, the program failed or printed something else, and
    IllegalInstruction for a SIGILL.
    """
    emulator = require_emulator()
    command = replace(machine, emulator=emulator).command(*arguments)
    libraries = build_libraries()
    # The clock is for QEMU, not for the program that it runs.
    command[1:1] = ["-plugin", str(libraries / f"{PLUGIN}.so"), "-U", "LD_PRELOAD"]
    environment = machine.environment(
        {**QUIET, "LD_PRELOAD": str(libraries / f"{CLOCK}.so"), **(extra or {})}
    )
    process = subprocess.run(
        [*fixed_addresses(), *command],
        env=environment,
        capture_output=True,
        text=True,
        cwd="/",
    )
    if process.returncode in (-signal.SIGILL, 128 + signal.SIGILL) or "Illegal instruction" in process.stderr:
        raise IllegalInstruction(f"an instruction that {machine.cpu} lacks was executed (SIGILL)")
    if process.returncode:
        lines = [
            line
            for line in process.stderr.splitlines()
            if line.strip() and not line.startswith(("instruction-count", *LISTING))
        ]
        raise UserError(
            f"the emulated program ended with status {process.returncode}: {lines[-1] if lines else ''}"
        )
    *_, last = ["", *process.stdout.splitlines()]
    document = documents.parse(last, kind, "what the emulated program printed", "run it again")
    return document, parse_counts(process.stderr)


@functools.cache
def fixed_addresses() -> list[str]:
    """Command prefix that runs a program without random addresses; empty where the system refuses, as containers may.

    QEMU then still gives its program the same ones each time, but others than elsewhere.
    """
    command = ["setarch", "-R"]
    try:
        return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else []
    except FileNotFoundError:
        return []


def parse_counts(text: str) -> dict[int, Region]:
    """{region: counts} of the plugin's lines."""
    counts, steps = {}, parse_steps(text)
    for line in re.findall(r"^instruction-count (.*)$", text, re.M):
        figures = {name: int(value) for name, value in (pair.split("=") for pair in line.split())}
        region = figures.pop("region")
        counts[region] = Region(**figures, steps=steps.get(region, ()))
    return counts


def build_libraries() -> Path:
    """The folder with the plugin and the clock for this machine's QEMU, kept by their sources. Raises UserError."""
    sources = [SOURCES / f"{name}.c" for name in (PLUGIN, CLOCK)]
    recipe = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}
    return cached_folder("plugin", recipe, lambda folder: _compile(sources, folder))


def _compile(sources: Sequence[Path], folder: Path) -> None:
    for source in sources:
        try:
            cortex_a53.build_library(source, folder)
        except subprocess.CalledProcessError:
            raise UserError(f"cc could not build {source.name}: see above.") from None
