"""The process of a worker, or of the program (ssh, QEMU) that leads to it: two unbuffered pipes, and its stderr."""

from __future__ import annotations

import subprocess
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import IO

_TAIL_BYTES = 8192


class WorkerProcess:
    """A process that the constructor starts and that ends with this object at the latest. Raises OSError."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, **options: object
    ):
        process: subprocess.Popen[bytes] = subprocess.Popen(  # type: ignore[call-overload]
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            **options,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self.pid = process.pid
        self.requests: IO[bytes] = process.stdin
        self.answers: IO[bytes] = process.stdout
        self._process = process
        self._tail = bytearray()
        # A thread reads stderr all the time, so that the program never waits for a reader.
        self._reader = threading.Thread(target=_keep_tail, args=(process.stderr, self._tail), daemon=True)
        self._reader.start()
        weakref.finalize(self, _end, process, 3)

    def end(self, patience_s: float = 3) -> int:
        """Close the worker's input, wait `patience_s` for its end, then kill it -> exit status."""
        _end(self._process, patience_s)
        return self._process.returncode

    def stderr_text(self) -> str:
        """The end of what the process printed on stderr; call it after `end`."""
        self._reader.join(timeout=1)
        return self._tail.decode(errors="replace").strip()


def last_line(text: str) -> str:
    """The last line of a program's output, without its full stop."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "it printed nothing"


def _keep_tail(stream: IO[bytes], tail: bytearray) -> None:
    while chunk := stream.read(4096):
        tail += chunk
        del tail[:-_TAIL_BYTES]


def _end(process: subprocess.Popen[bytes], patience_s: float) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    for stop in (lambda: None, process.terminate, process.kill):
        stop()
        try:
            process.wait(patience_s)
            return
        except subprocess.TimeoutExpired:
            continue
