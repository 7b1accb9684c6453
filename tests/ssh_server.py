"""A real sshd on the loopback interface, run as this user with its own keys, configuration and device cache."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ATTEMPTS = 5
PORT_TAKEN = "Address already in use"
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
SetEnv MICROVLM_CACHE={folder}/device_cache
{more}
"""


def user_name() -> str:
    """The user of this process, independent of the environment."""
    return pwd.getpwuid(os.geteuid()).pw_name


@dataclass(frozen=True)
class SshServer:
    folder: Path
    port: int

    @property
    def target(self) -> str:
        return f"ssh:{user_name()}@127.0.0.1:{self.port}"

    @property
    def cache(self) -> Path:
        """The device's cache."""
        return self.folder / "device_cache" / "device"

    def command(self, *more: str) -> str:
        """A value for MICROVLM_SSH_COMMAND that ignores the user's configuration, known hosts and keys."""
        known_hosts = f"UserKnownHostsFile={self.folder}/known"
        options = f"-F none -i {self.folder}/user_key -o IdentitiesOnly=yes -o {known_hosts}"
        return f"ssh {options} -o StrictHostKeyChecking=accept-new {' '.join(more)}".rstrip()

    def environment(self) -> dict[str, str]:
        """Variables for the host: the device's Python is the one that runs the tests, with its packages."""
        return {"MICROVLM_SSH_COMMAND": self.command(), "MICROVLM_DEVICE_PYTHON": sys.executable}


@contextmanager
def serving(folder: Path, more: str = "") -> Iterator[SshServer]:
    """Run a server; `more` has further lines of its configuration."""
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    if os.geteuid() == 0:
        # Debian creates this folder when the service starts; sshd needs it only as root.
        Path("/run/sshd").mkdir(exist_ok=True)
    process, port = _start(folder, more)
    try:
        yield SshServer(folder, port)
    finally:
        process.terminate()
        process.wait()


def _start(folder: Path, more: str) -> tuple[subprocess.Popen, int]:
    """-> (process, port). sshd accepts no port 0, so a free one is looked up; where another program takes it first, the
    next one is tried."""
    log = folder / "sshd.log"
    for _ in range(ATTEMPTS):
        port = _free_port()
        (folder / "sshd_config").write_text(_CONFIG.format(port=port, folder=folder, more=more))
        command = [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, stderr=stderr, stdin=subprocess.DEVNULL)
        if _listens(process, log):
            return process, port
        assert PORT_TAKEN in log.read_text(), log.read_text()
    raise AssertionError(log.read_text())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def session_of(pid: int) -> int:
    """The sshd process that a process of a session descends from."""
    while pid > 1:
        if b"sshd" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
            return pid
        # The name in the second field may hold spaces; it ends with the last parenthesis.
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    raise AssertionError("no sshd above this process")


def _listens(process: subprocess.Popen, log: Path) -> bool:
    """Does sshd itself report that it listens? False where it ended."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if "Server listening on" in log.read_text():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    process.kill()
    process.wait()
    raise AssertionError(log.read_text())
