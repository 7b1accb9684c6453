"""Transport `ssh`: one ssh connection installs the worker on another machine, starts it and carries its frames.

The machine needs Python alone: Python packages, microvlm and the bundle are copied there once, named by their
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

from microvlm.backends.arm64.device_errors import PACKAGES, DamagedCopyError
from microvlm.backends.arm64.transports.delivery import Delivery
from microvlm.backends.arm64.transports.local import WORKER
from microvlm.backends.arm64.transports.worker_process import WorkerProcess, last_line
from microvlm.backends.arm64.worker_link import await_greeting
from microvlm.backends.emulation.progress import Progress, StderrProgress
from microvlm.console import note
from microvlm.errors import UserError

SSH_SWITCH = "MICROVLM_SSH_COMMAND"
PYTHON_SWITCH = "MICROVLM_DEVICE_PYTHON"
OLDEST_PYTHON = (3, 11)
SSH_FAILED, NOT_FOUND = 255, 127
"""Exit status of ssh for its own errors, and of a shell that has no such program."""
# ssh notices a silently broken connection after half a minute.
OPTIONS = ("-T", "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3", "-o", "ConnectTimeout=15")
PASSED_VARIABLES = ("MICROVLM_KERNELS", "MICROVLM_NATIVE")
"""Environment variables that the worker gets too, unless their values are paths."""
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
    """Connects when a worker is started. Raises UserError for a malformed place."""

    def __init__(self, place: str, report: Progress | None = None):
        match = _PLACE.fullmatch(place)
        if match is None or match["host"].startswith("-") or (match["user"] or "").startswith("-"):
            raise UserError(
                f"--target ssh:{place} is not the name of a machine: give ssh:USER@HOST or ssh:USER@HOST:PORT."
            )
        host = match["host"].strip("[]")
        self.name = f"ssh:{place}"
        self._place = f"{match['user']}@{host}" if match["user"] else host
        self._port = ["-p", match["port"]] if match["port"] else []
        self._report = report or StderrProgress()
        self._damaged: set[str] = set()
        """Parts that the next start sends again."""
        self._mended: set[str] = set()

    def start(self, bundle: Path) -> tuple[WorkerProcess, str]:
        process = WorkerProcess(self._command())
        await_greeting(process, self.explain)
        delivery = Delivery(process, self._place, self._report, self._damaged)
        path = delivery.packages()
        folder = delivery.bundle(bundle)
        environment = {
            name: os.environ[name] for name in PASSED_VARIABLES if "/" not in os.environ.get(name, "/")
        }
        delivery.start(path, list(WORKER), environment)
        self._damaged.clear()
        return process, folder

    def explain(self, status: int, stderr: str) -> str:
        if _TOO_OLD in stderr:
            version, oldest = stderr.split(_TOO_OLD)[1].split()[0], ".".join(map(str, OLDEST_PYTHON))
            return (
                f"{self._place} has Python {version} and microvlm needs {oldest} or newer: "
                f"install one and name it with {PYTHON_SWITCH}."
            )
        if status == SSH_FAILED:
            for message, meaning in _FAILURES:
                if message in stderr:
                    return f"{self._place} cannot be used: {meaning}."
        elif status == NOT_FOUND:
            return f"{self._place} has no {self._python()}: apt-get install python3 there, or set {PYTHON_SWITCH}."
        return f"{self._place} cannot be used (ssh ended with status {status}): {last_line(stderr)}."

    def mend(self, damage: DamagedCopyError) -> None:
        """Send the damaged part again, once: a device that damages the second copy would damage every other."""
        copied = "microvlm" if damage.part == PACKAGES else "the bundle"
        cause = str(damage).rstrip(".")
        if damage.part in self._mended:
            packages = ", and its own Python's packages" if damage.part == PACKAGES else ""
            raise UserError(
                f"{self._place} was sent {copied} again and still cannot use it ({cause}): check its SD card and power "
                f"supply{packages}."
            )
        note(f"{self._place} has a damaged copy of {copied}, which is sent again ({cause})")
        self._mended.add(damage.part)
        self._damaged.add(damage.part)

    def _command(self) -> list[str]:
        command = shlex.split(os.environ.get(SSH_SWITCH) or "ssh")
        if not command or shutil.which(command[0]) is None:
            raise UserError(
                f"the program '{' '.join(command[:1])}' was not found: apt-get install openssh-client."
            )
        program = base64.b64encode(zlib.compress(_bootstrap().encode(), 9)).decode()
        # One line without quoting, because the user's shell on the device is unknown; an old Python must parse it too.
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
