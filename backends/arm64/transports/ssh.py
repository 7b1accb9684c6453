"""The worker on another machine, through this system's own ssh: one connection that installs, starts and talks.

The machine needs Python and nothing else of ours: packages, this package and the bundle are copied once, by their
hashes. MICROVLM_SSH_COMMAND replaces `ssh`, as in "ssh -i key"; MICROVLM_DEVICE_PYTHON the device's `python3`.
"""

from __future__ import annotations

import base64
import importlib.util
import os
import re
import shlex
import shutil
import zlib
from pathlib import Path
from typing import Any

from microvlm.backends.arm64.device_errors import PACKAGES, Damaged
from microvlm.backends.arm64.transports.delivery import Delivery
from microvlm.backends.arm64.transports.local import WORKER
from microvlm.backends.arm64.transports.worker_process import Child, last_line
from microvlm.backends.arm64.worker_link import greet
from microvlm.backends.emulation.progress import Progress, StderrProgress
from microvlm.console import note
from microvlm.errors import UserError

SSH_SWITCH = "MICROVLM_SSH_COMMAND"
PYTHON_SWITCH = "MICROVLM_DEVICE_PYTHON"
OLDEST_PYTHON = (3, 11)
SSH_FAILED, NOT_FOUND = 255, 127
"""Exit status of ssh for its own errors, and of a shell that has no such program."""
# A connection that is silently gone is noticed after half a minute.
OPTIONS = ("-T", "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3", "-o", "ConnectTimeout=15")
PASSED_ON = ("MICROVLM_KERNELS", "MICROVLM_NATIVE")
"""Of this environment, where they are names and not paths."""
_TOO_OLD = "microvlm needs another Python than "
_PLACE = re.compile(r"(?:(?P<user>[\w.-]+)@)?(?P<host>\[[0-9a-fA-F:.%\w]+\]|[\w.-]+)(?::(?P<port>\d+))?")
_BOOTSTRAP = """\
import sys, types
for name in ("microvlm", "microvlm.backends", "microvlm.backends.arm64"):
    sys.modules[name] = types.ModuleType(name)
frames = sys.modules["microvlm.backends.arm64.frames"] = types.ModuleType("microvlm.backends.arm64.frames")
exec({frames!r}, frames.__dict__)
exec({installer!r}, {{"__name__": "__main__"}})
"""
_FAILURES = (
    ("Could not resolve hostname", "its name is not known here; check it, or give the address"),
    (
        "Connection refused",
        "it answers, but no ssh server does: enable it with raspi-config, or check the port",
    ),
    ("Connection timed out", "it does not answer: check that it is on and in this network"),
    ("No route to host", "it cannot be reached: check that it is on and in this network"),
    ("Network is unreachable", "its network cannot be reached from here"),
    ("Host key verification failed", "its host key is not trusted; run ssh once by hand and check the key"),
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key has changed; remove the old one with ssh-keygen -R",
    ),
    ("Permission denied", "it refused the login: check the user and the key (ssh-copy-id)"),
    (
        "Too many authentication failures",
        "it refused the login: name one key, as in MICROVLM_SSH_COMMAND='ssh -i KEY'",
    ),
)


class SshTransport:
    """Connects when it is started. Raises UserError for a place that is none."""

    def __init__(self, place: str, report: Progress | None = None):
        match = _PLACE.fullmatch(place)
        if match is None or match["host"].startswith("-") or (match["user"] or "").startswith("-"):
            raise UserError(
                f"--target ssh:{place} names no machine: give ssh:USER@HOST or ssh:USER@HOST:PORT."
            )
        host = match["host"].strip("[]")
        self.name = f"ssh:{place}"
        self._place = f"{match['user']}@{host}" if match["user"] else host
        self._port = ["-p", match["port"]] if match["port"] else []
        self._report = report or StderrProgress()
        self._damaged: set[str] = set()
        """What the next start sends again."""
        self._mended: set[str] = set()

    def start(self, bundle: Path) -> tuple[Child, str]:
        child = Child(self._command())
        greet(child, self.explain)
        delivery = Delivery(child, self._place, self._report, self._damaged)
        path = delivery.packages()
        folder = delivery.bundle(bundle)
        environment = {name: os.environ[name] for name in PASSED_ON if "/" not in os.environ.get(name, "/")}
        delivery.start(path, list(WORKER), environment)
        self._damaged.clear()
        return child, folder

    def explain(self, status: int, said: str) -> str:
        if _TOO_OLD in said:
            oldest = ".".join(map(str, OLDEST_PYTHON))
            return (
                f"{self._place} has Python {said.split(_TOO_OLD)[1].split()[0]} and microvlm needs {oldest} or newer: "
                f"install one and name it with {PYTHON_SWITCH}."
            )
        if status == SSH_FAILED:
            for sign, meaning in _FAILURES:
                if sign in said:
                    return f"{self._place} cannot be used: {meaning}."
        elif status == NOT_FOUND:
            return f"{self._place} has no {self._python()}: apt-get install python3 there, or set {PYTHON_SWITCH}."
        return f"{self._place} cannot be used (ssh ended with status {status}): {last_line(said)}."

    def mend(self, damage: Damaged) -> None:
        """Once: a device that damages the second copy too would do so with every other."""
        copied = "microvlm" if damage.what == PACKAGES else "the bundle"
        cause = str(damage).rstrip(".")
        if damage.what in self._mended:
            packages = ", and its own Python's packages" if damage.what == PACKAGES else ""
            raise UserError(
                f"{self._place} was sent {copied} again and still cannot use it ({cause}): check its SD card and power "
                f"supply{packages}."
            )
        note(f"{self._place} has a damaged copy of {copied}, which is sent again ({cause})")
        self._mended.add(damage.what)
        self._damaged.add(damage.what)

    def _command(self) -> list[str]:
        command = shlex.split(os.environ.get(SSH_SWITCH) or "ssh")
        if not command or shutil.which(command[0]) is None:
            raise UserError(
                f"the program '{' '.join(command[:1])}' was not found: apt-get install openssh-client."
            )
        program = base64.b64encode(zlib.compress(_bootstrap().encode(), 9)).decode()
        # One line and plain words only, for whatever shell the user has there. An old Python must read it too.
        code = (
            f"import sys,zlib,base64;sys.version_info<{OLDEST_PYTHON} and "
            f'sys.exit("{_TOO_OLD}%d.%d"%sys.version_info[:2]);exec(zlib.decompress(base64.b64decode("{program}")))'
        )
        return [*command, *OPTIONS, *self._port, "--", self._place, f"exec {self._python()} -c '{code}'"]

    def _python(self) -> str:
        return os.environ.get(PYTHON_SWITCH) or "python3"


def _bootstrap() -> str:
    return _BOOTSTRAP.format(frames=_source("frames"), installer=_source("device.installer"))


def _source(module: str) -> str:
    spec: Any = importlib.util.find_spec(f"microvlm.backends.arm64.{module}")
    return Path(spec.origin).read_text(encoding="utf-8")
