"""Backend `ort-arm64`: runs a bundle on an ARM64 machine: this one, one reached over ssh, or an emulated one.

README.md describes the protocol, the transports and the settings. Modules are imported when they are first used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from microvlm.backends.base import Backend, LoadedRuntime
from microvlm.errors import UserError

OPTIONS = ("allow_spinning", "arena", "native", "verify")


class Arm64Backend(Backend):
    name = "ort-arm64"
    runs_here = False

    def unavailable(self) -> str | None:
        from microvlm.backends.arm64.targets import unavailable

        return unavailable()

    def load(
        self, source: str | Path, threads: int | None = None, target: str | None = None, **options: Any
    ) -> LoadedRuntime:
        """`target`: `local`, `ssh:USER@HOST[:PORT]` or `emulated[:CPU]`; None for the default.

        Other options are those of `graph_server.DeviceSettings`. Raises UserError.
        """
        from microvlm.backends.arm64.device_runtime import Arm64Runtime
        from microvlm.backends.arm64.targets import open_transport
        from microvlm.backends.resolve import resolve_bundle

        unknown = next((name for name in options if name not in OPTIONS), None)
        if unknown is not None:
            raise UserError(f"backend 'ort-arm64' has no option '{unknown}'.")
        transport = open_transport(target)
        return Arm64Runtime(resolve_bundle(source), transport, {"threads": threads, **options})
