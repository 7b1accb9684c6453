"""A real sshd on this machine's loopback, with keys, a configuration and a device's cache of its own, as this user."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class SshServer:
    folder: Path
    port: int

    @property
    def target(self) -> str:
        return f"ssh:{getpass.getuser()}@127.0.0.1:{self.port}"

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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd_config").write_text(_CONFIG.format(port=port, folder=folder, more=more))
    if os.geteuid() == 0:
        # Debian makes this when the service starts; only a root's sshd asks for it.
        Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "sshd.log").open("wb") as log:
        command = [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
        process = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL)
    try:
        _wait_for(port, process, folder / "sshd.log")
        yield SshServer(folder, port)
    finally:
        process.terminate()
        process.wait()


def session_of(pid: int) -> int:
    """The sshd process that a process of a session descends from."""
    while pid > 1:
        if b"sshd" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
            return pid
        # The name in the second field may hold spaces; it ends with the last parenthesis.
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    raise AssertionError("no sshd above this process")


def _wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(log.read_text())
