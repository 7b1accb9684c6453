"""A real sshd on this machine's loopback, with keys, a configuration and a device's cache of its own, as this user."""

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

TRIES = 5
TAKEN = "Address already in use"
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
    """Whose processes these are, whatever the environment says."""
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
        """Where the device keeps what it was given."""
        return self.folder / "device_cache" / "device"

    def command(self, *more: str) -> str:
        """For MICROVLM_SSH_COMMAND: none of the user's own configuration, known hosts and keys."""
        known = f"UserKnownHostsFile={self.folder}/known"
        options = ["-F", "none", "-i", f"{self.folder}/user_key", "-o", "IdentitiesOnly=yes", "-o", known]
        return " ".join(["ssh", *options, "-o", "StrictHostKeyChecking=accept-new", *more])

    def environment(self) -> dict[str, str]:
        """The device's Python is the one that runs this: it has the packages."""
        return {"MICROVLM_SSH_COMMAND": self.command(), "MICROVLM_DEVICE_PYTHON": sys.executable}


@contextmanager
def serving(folder: Path, more: str = "") -> Iterator[SshServer]:
    """`more`: further lines of its configuration."""
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    if os.geteuid() == 0:
        # Debian makes this when the service starts; only a root's sshd asks for it.
        Path("/run/sshd").mkdir(exist_ok=True)
    process, port = _start(folder, more)
    try:
        yield SshServer(folder, port)
    finally:
        process.terminate()
        process.wait()


def _start(folder: Path, more: str) -> tuple[subprocess.Popen, int]:
    """(its process, the port that it listens on). sshd takes no port 0, so a free one is looked up; where another
    program was faster, sshd ends and the next one is tried."""
    log = folder / "sshd.log"
    for _ in range(TRIES):
        port = _free_port()
        (folder / "sshd_config").write_text(_CONFIG.format(port=port, folder=folder, more=more))
        command = [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
        with log.open("wb") as said:
            process = subprocess.Popen(command, stderr=said, stdin=subprocess.DEVNULL)
        if _listens(process, log):
            return process, port
        assert TAKEN in log.read_text(), log.read_text()
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
    """Whether sshd says so, and not merely whether somebody answers on its port; False when it ended."""
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
