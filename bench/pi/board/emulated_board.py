"""A whole emulated board: QEMU with four cores, a board's memory, no swap, and Debian's own kernel.

Memory peaks, the OOM killer and illegal instructions are those of a real board; times are not. Knows no model.
"""

from __future__ import annotations

import secrets
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from microvlm.backends.emulation.cpus import CORES, DEFAULT_CPU
from microvlm.backends.emulation.progress import Progress, StderrProgress
from microvlm.backends.emulation.sites import ensure_site
from microvlm.backends.emulation.sysroot import ensure_sysroot
from microvlm.bench.pi.board.disk_image import PYTHON_SITE, DiskImage, ensure_image, write_data_disk
from microvlm.bench.pi.board.guest_program import (
    CommandOutcome,
    GuestCommand,
    parse_outcomes,
    supervisor_script,
)
from microvlm.errors import UserError

EMULATOR = "qemu-system-aarch64"
PORTS = ("stdout", "stderr", "report")
# A console script for the board's Python, as pip would write it.
PROGRAM = "#!/usr/bin/python3\nimport sys\n\nfrom microvlm.cli import {function}\n\nsys.exit({function}())\n"
PROGRAMS = {"microvlm": "main", "microvlm-bench": "bench"}


@dataclass(frozen=True)
class EmulatedBoard:
    """An emulated board, not started; `open_emulated_board` creates one and `run` starts it."""

    emulator: str
    cpu: str
    cores: int
    ram_mb: int
    image: DiskImage
    files: Mapping[str, Path | str]
    """Path below /srv there -> a file or folder here, or a text."""
    network: bool = False
    """Has the board a network, through this machine?"""

    @property
    def ram_bytes(self) -> int:
        return self.ram_mb << 20

    def command(self, disk: Path, folder: Path) -> list[str]:
        """QEMU's command line with the data disk `disk`; the ports' files appear in `folder`."""
        line = [
            self.emulator,
            "-M",
            "virt",
            "-cpu",
            self.cpu,
            "-smp",
            str(self.cores),
            "-m",
            str(self.ram_mb),
        ]
        line += ["-nographic", "-no-reboot", "-kernel", str(self.image.kernel)]
        line += ["-initrd", str(self.image.initrd), "-append", "console=ttyAMA0 panic=-1 quiet"]
        for name, path, more in (("root", self.image.disk, "snapshot=on"), ("data", disk, "readonly=on")):
            line += ["-drive", f"file={path},format=raw,if=none,id={name},{more}"]
            line += ["-device", f"virtio-blk-pci,drive={name}"]
        line += ["-device", "virtio-serial-pci"]
        for number, name in enumerate(PORTS, 1):
            line += ["-chardev", f"file,id={name},path={folder / name}"]
            line += ["-device", f"virtserialport,chardev={name},nr={number}"]
        if not self.network:
            return [*line, "-nic", "none"]
        # No boot ROM: it is in a separate package, and nothing boots from the network.
        return [*line, "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]

    def run(
        self,
        commands: Sequence[GuestCommand],
        timeout_s: float = 600,
    ) -> list[CommandOutcome]:
        """Boot the machine once and run `commands` in turn, each with an empty page cache -> one outcome each.

        Raises UserError where the machine does not start, stops before the last command or takes longer than
        `timeout_s` in all.
        """
        mark = f"--{secrets.token_hex(16)}--"
        with tempfile.TemporaryDirectory(prefix="microvlm-board-") as temporary:
            folder = Path(temporary)
            files = dict(self.files) | {"supervise": supervisor_script(mark)}
            for number, command in enumerate(commands):
                files[f"jobs/{number:03}/command"] = command.script()
                files[f"jobs/{number:03}/stdin"] = command.stdin
            write_data_disk(files, folder / "data.ext4")
            console = self._wait(folder, timeout_s)
            texts = [_text(folder / name) for name in PORTS]
        outcomes = parse_outcomes(texts[2], texts[0], texts[1], mark)
        if len(outcomes) < len(commands):
            last = [line for line in console.splitlines() if line.strip()][-1:] or ["nothing on its console"]
            raise UserError(
                f"the emulated board ended after {len(outcomes)} of {len(commands)} commands "
                f"(time limit {timeout_s:g} s; last line: {last[0].strip()})."
            )
        return outcomes

    def _wait(self, folder: Path, timeout_s: float) -> str:
        """Run QEMU to its end or to the time limit -> the text on its console."""
        with (folder / "console").open("wb") as console:
            process = subprocess.Popen(
                self.command(folder / "data.ext4", folder),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                pass
            finally:
                process.kill()
                process.wait()
        return _text(folder / "console")


def open_emulated_board(
    ram_mb: int,
    cores: int = CORES,
    cpu: str = DEFAULT_CPU,
    requirements: Sequence[str] = (),
    packages: Sequence[str | Path] = (),
    files: Mapping[str, Path | str] | None = None,
    environment: Mapping[str, str] | None = None,
    report: Progress | None = None,
) -> EmulatedBoard:
    """A board with `ram_mb` MiB whose Python has `requirements` and, before them on the path, `packages`.

    `packages`: wheels for aarch64, and folders that hold packages. `files`: path below /srv there -> a file or folder
    here, or a text. Missing parts are built into the user's cache, with the steps on stderr. Raises UserError: no
    QEMU, no apt, no network, a wheel for another machine.
    """
    emulator = find_emulator()
    report = report or StderrProgress()
    image = ensure_image(cpu, requirements, report)
    data_files: dict[str, Path | str] = dict(files or {})
    paths: list[str] = []
    for package in map(Path, packages):
        if package.is_dir():
            site = package
        else:
            site = ensure_site(ensure_sysroot(cpu, report), [str(package)], report, dependencies=False)
        data_files[f"python/{len(paths)}"] = site
        paths.append(f"/srv/python/{len(paths)}")
    path = ":".join([*paths, f"/{PYTHON_SITE}"])
    exports = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "HOME": "/root", "LANG": "C.UTF-8"}
    exports |= environment or {}
    data_files["prepare"] = "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in exports.items()
    )
    for program, function in PROGRAMS.items() if packages else ():
        data_files[f"bin/{program}"] = PROGRAM.format(function=function)
    return EmulatedBoard(emulator, cpu, cores, ram_mb, image, data_files)


def find_emulator() -> str:
    """Path of QEMU's system emulator. Raises UserError where it is not installed."""
    emulator = shutil.which(EMULATOR)
    if emulator is None:
        raise UserError("QEMU's aarch64 machine was not found: apt-get install qemu-system-arm.")
    return emulator


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
