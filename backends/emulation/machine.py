"""An emulated machine that runs Python programs: QEMU's user mode, a sysroot, and folders of packages.

Files and memory are this machine's; instructions and the CPU's description are the board's. Programs that an emulated
program starts are not emulated. Times say nothing about a board.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microvlm.backends.emulation.cpus import DEFAULT_CPU
from microvlm.backends.emulation.progress import Progress, StderrProgress
from microvlm.backends.emulation.sites import ensure_site, python_version
from microvlm.backends.emulation.sysroot import ensure_sysroot
from microvlm.errors import UserError

EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")


@dataclass(frozen=True)
class EmulatedMachine:
    """Runs Python programs on an emulated CPU; `open_machine` creates one."""

    emulator: str
    cpu: str
    sysroot: Path
    sites: tuple[Path, ...]
    """Folders of packages, in the order of the search."""

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs the emulated Python with `arguments`."""
        python = self.sysroot / "usr" / "bin" / f"python{python_version(self.sysroot)}"
        return [self.emulator, "-L", str(self.sysroot), "-cpu", self.cpu, str(python), *arguments]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The program's whole environment, without anything of this machine's Python."""
        return {
            "PATH": "/usr/bin:/bin",
            "HOME": "/nonexistent",
            "LANG": "C.UTF-8",
            "PYTHONPATH": ":".join(map(str, self.sites)),
            "PYTHONNOUSERSITE": "1",
            "PYTHONSAFEPATH": "1",
            **(extra or {}),
        }

    def run(
        self, *arguments: str, extra: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run the emulated Python with `arguments` and capture its output; `options` are those of subprocess.run."""
        settings = {"capture_output": True, "text": True, **options}
        return subprocess.run(self.command(*arguments), env=self.environment(extra), **settings)


def open_machine(
    cpu: str = DEFAULT_CPU,
    requirements: Sequence[str] = (),
    wheels: Sequence[str | Path] = (),
    report: Progress | None = None,
) -> EmulatedMachine:
    """A machine with `requirements` (as pip takes them) and, before them on the path, `wheels` without dependencies.

    Missing parts are built into the user's cache, with the steps on stderr. Raises UserError: no QEMU, no apt, no
    network, an unknown CPU, a wheel for another machine.
    """
    emulator = next((path for path in map(shutil.which, EMULATORS) if path), None)
    if emulator is None:
        raise UserError("QEMU's aarch64 emulator was not found: apt-get install qemu-user-static.")
    report = report or StderrProgress()
    sysroot = ensure_sysroot(cpu, report)
    sites = [ensure_site(sysroot, [str(wheel)], report, dependencies=False) for wheel in wheels]
    if requirements:
        sites.append(ensure_site(sysroot, requirements, report))
    return EmulatedMachine(emulator, cpu, sysroot, tuple(sites))
