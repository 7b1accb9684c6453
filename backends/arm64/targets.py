"""Which machine: the words after --target, and what is chosen without them."""

from __future__ import annotations

import os
import platform
import shutil

from microvlm.backends.arm64.worker_link import Transport
from microvlm.errors import UserError

SWITCH = "MICROVLM_TARGET"
FORMS = "local, ssh:USER@HOST[:PORT] or emulated[:CPU]"
MACHINES = ("aarch64", "arm64")
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
_NOTHING = (
    "this machine is no ARM64 one, and neither ssh nor an emulator was found: "
    "apt-get install qemu-user-static, or openssh-client for --target ssh:USER@HOST."
)


def unavailable() -> str | None:
    """Why no target at all can be had here; None where one can."""
    programs = (*EMULATORS, "ssh")
    there = platform.machine() in MACHINES or any(shutil.which(program) for program in programs)
    return None if there else _NOTHING


def default_target() -> str:
    """$MICROVLM_TARGET, this machine if it is an ARM64 one, else an emulated one. Raises UserError."""
    if os.environ.get(SWITCH):
        return os.environ[SWITCH]
    if platform.machine() in MACHINES:
        return "local"
    if any(shutil.which(program) for program in EMULATORS):
        return "emulated"
    raise UserError(
        f"this machine is {platform.machine()}: give --target ssh:USER@HOST, or apt-get install "
        "qemu-user-static for an emulated one."
    )


def open_transport(target: str | None) -> Transport:
    """Connects to nothing yet. Raises UserError for a target that is none."""
    from microvlm.backends.arm64.transports.emulated import EmulatedTransport
    from microvlm.backends.arm64.transports.local import LocalTransport
    from microvlm.backends.arm64.transports.ssh import SshTransport

    chosen = target or default_target()
    kind, _, rest = chosen.partition(":")
    if chosen == "local":
        return LocalTransport()
    if kind == "ssh" and rest:
        return SshTransport(rest)
    if kind == "emulated":
        return EmulatedTransport(rest) if rest else EmulatedTransport()
    raise UserError(f"--target '{chosen}' is unknown: give {FORMS}.")
