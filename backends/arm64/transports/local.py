"""The worker as a child process on this machine."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from microvlm.backends.arm64.device_errors import Damaged
from microvlm.backends.arm64.transports.worker_process import Child, last_line

WORKER = ("-m", "microvlm.backends.arm64.device.worker")


class LocalTransport:
    name = "local"

    def start(self, bundle: Path) -> tuple[Child, str]:
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        # A key press that interrupts this program is for it alone: it ends the worker itself.
        child = Child([sys.executable, *WORKER], environment, start_new_session=True)
        return child, str(bundle.resolve())

    def explain(self, status: int, said: str) -> str:
        return f"the worker did not start on this {platform.machine()} machine (status {status}): {last_line(said)}."

    def mend(self, damage: Damaged) -> None:
        """Nothing was copied."""
        raise damage
