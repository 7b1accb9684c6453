"""Backend `ort-arm64`: a bundle on an ARM64 machine, which may be this one, one over ssh, or an emulated one.

See README.md for the protocol, the transports and the settings. Nothing of it is imported before it is used.
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
        """`target`: `local`, `ssh:USER@HOST[:PORT]` or `emulated[:CPU]`; None for $MICROVLM_TARGET or what is there.

        Other options are those of `host.Settings`. Raises UserError.
        """
        from microvlm.backends.arm64.device_runtime import Arm64Runtime
        from microvlm.backends.arm64.targets import open_transport
        from microvlm.backends.resolve import resolve_bundle

        unknown = next((name for name in options if name not in OPTIONS), None)
        if unknown is not None:
            raise UserError(f"backend 'ort-arm64' has no option '{unknown}'.")
        transport = open_transport(target)
        return Arm64Runtime(resolve_bundle(source), transport, {"threads": threads, **options})
