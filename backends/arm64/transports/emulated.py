"""Transport `emulated`: the worker runs in QEMU's user mode, with this package beside an aarch64 ONNX Runtime."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from microvlm.backends.arm64.device_errors import DamagedCopyError
from microvlm.backends.arm64.transports.device_package import unpacked_package
from microvlm.backends.arm64.transports.local import WORKER
from microvlm.backends.arm64.transports.worker_process import WorkerProcess, last_line
from microvlm.backends.emulation import DEFAULT_CPU, EmulatedMachine, open_machine, runtime_requirements


class EmulatedTransport:
    """The emulated machine is built in the user's cache at the first start, with a progress bar."""

    def __init__(self, cpu: str = DEFAULT_CPU):
        self.name = f"emulated:{cpu}"
        self._cpu = cpu
        self._machine: EmulatedMachine | None = None

    def start(self, bundle: Path) -> tuple[WorkerProcess, str]:
        if self._machine is None:
            machine = open_machine(self._cpu, runtime_requirements())
            sites = (unpacked_package("aarch64"), *machine.sites)
            self._machine = dataclasses.replace(machine, sites=sites)
        command, environment = self._machine.command(*WORKER), self._machine.environment()
        return WorkerProcess(command, environment, cwd="/", start_new_session=True), str(bundle.resolve())

    def explain(self, status: int, stderr: str) -> str:
        return f"the worker did not start in the emulated machine (status {status}): {last_line(stderr)}."

    def mend(self, damage: DamagedCopyError) -> None:
        """Raise `damage`: nothing was copied that could be sent again."""
        raise damage
