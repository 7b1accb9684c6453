"""A program on a terminal of its own: what is typed, and what the program writes."""

from __future__ import annotations

import errno
import os
import select
import signal
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence

DEADLINE_S = 120
"""A program that has written nothing of what is waited for by then hangs."""


class Terminal:
    """Runs a program with a new pseudo-terminal as its stdin, stdout and stderr. Use it in a `with` statement."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        columns: int = 80,
        rows: int = 24,
        cwd: str | os.PathLike[str] | None = None,
    ):
        import fcntl
        import pty
        import termios

        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.written = b""
        """All that the program wrote, and the echo of what was typed."""
        # These would be believed before the terminal's own size.
        variables = os.environ if environment is None else environment
        variables = {name: value for name, value in variables.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=variables, cwd=cwd, start_new_session=True
        )
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, text: str, after: int = 0) -> str:
        """Wait for `text` in what is written after so many bytes -> all of that. Fails at the end of the program."""
        deadline = time.monotonic() + DEADLINE_S
        while text.encode() not in self.written[after:]:
            assert time.monotonic() < deadline, self.written[after:]
            assert self._read(), self.written[after:]
        return self.written[after:].decode(errors="replace")

    def read_all(self, deadline_s: float = DEADLINE_S) -> str:
        """Wait for the end of the program -> all that it wrote."""
        deadline = time.monotonic() + deadline_s
        while self._read():
            assert time.monotonic() < deadline, self.written
        self.process.wait(DEADLINE_S)
        return self.written.decode(errors="replace")

    def _read(self) -> bool:
        """Take what is there, waiting up to a second for it -> whether more can come."""
        if not select.select([self._master], [], [], 1)[0]:
            return True
        try:
            piece = os.read(self._master, 65536)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False  # so Linux says that all programs on the terminal have ended
        self.written += piece
        return bool(piece)
