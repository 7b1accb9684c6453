"""Turns the words after --target into a transport, and chooses a target where there are none."""

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
_NO_TARGET = (
    "this machine is not ARM64, and neither ssh nor an emulator was found: "
    "apt-get install qemu-user-static, or openssh-client for --target ssh:USER@HOST."
)


def unavailable() -> str | None:
    """The reason why no target can be used here; None where one can."""
    programs = (*EMULATORS, "ssh")
    usable = platform.machine() in MACHINES or any(shutil.which(program) for program in programs)
    return None if usable else _NO_TARGET


def default_target() -> str:
    """$MICROVLM_TARGET; else this machine where it is ARM64; else an emulated one. Raises UserError."""
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
    """The transport for a target; it connects later. Raises UserError for an unknown target."""
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
