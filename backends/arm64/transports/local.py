"""Transport `local`: the worker is a child process on this machine."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from microvlm.backends.arm64.device_errors import DamagedCopyError
from microvlm.backends.arm64.transports.worker_process import WorkerProcess, last_line

WORKER = ("-m", "microvlm.backends.arm64.device.worker")


class LocalTransport:
    name = "local"

    def start(self, bundle: Path) -> tuple[WorkerProcess, str]:
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        # A new session: Ctrl-C interrupts this program alone, which ends the worker itself.
        process = WorkerProcess([sys.executable, *WORKER], environment, start_new_session=True)
        return process, str(bundle.resolve())

    def explain(self, status: int, stderr: str) -> str:
        return f"the worker did not start on this {platform.machine()} machine (status {status}): {last_line(stderr)}."

    def mend(self, damage: DamagedCopyError) -> None:
        """Raise `damage`: nothing was copied that could be sent again."""
        raise damage
