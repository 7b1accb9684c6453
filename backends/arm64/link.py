"""One worker at the other end of a transport: started, asked, and started again when it is lost.

Knows frames and requests, no graphs. A request is answered before the next one is sent.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from microvlm.backends.arm64.frames import Garbled, Lost, Tensor, read_frame, read_greeting, write_frame
from microvlm.cli_support import note
from microvlm.errors import UserError

DELAYS_S = (0.5, 1, 2, 4, 8, 16)
"""Waited before each try to come back."""
_TAIL_BYTES = 8192


class Started(NamedTuple):
    """A worker's process, or that of the program that leads to it, with unbuffered pipes; it has not greeted yet."""

    process: subprocess.Popen[bytes]
    bundle: str
    """The bundle's folder as the worker sees it."""


class Transport(Protocol):
    """How a worker is started."""

    name: str
    """As the user would type it after --target."""

    def start(self, bundle: Path) -> Started:
        """Raises UserError, or Lost for a connection that broke on the way."""
        ...

    def explain(self, status: int, said: str) -> str:
        """One sentence for a worker that ended with `status` before it greeted, with what stderr said."""
        ...


class Link:
    """Starts the worker at once. Raises UserError."""

    def __init__(self, transport: Transport, bundle: Path, settings: dict[str, Any]):
        self.transport = transport
        self.epoch = 0
        """Counts the workers: what an earlier one kept is gone."""
        self.free: list[int] = []
        """Numbers of values that nobody needs any more; they go with the next request."""
        self.loaded: dict[str, Any] = {}
        """What the worker said about its device and kernels."""
        self._bundle, self._settings = bundle, settings
        self._process: subprocess.Popen[bytes] | None = None
        self._ids = 0
        self._connect()

    @property
    def is_up(self) -> bool:
        return self._process is not None

    def call(
        self,
        request: dict[str, Any],
        tensors: Sequence[Tensor] = (),
        on_event: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """The answer; frames before it go to `on_event`. Raises Lost, and UserError for what the worker refused."""
        process = self._process
        if process is None:
            raise Lost
        self._ids += 1
        freed, self.free = self.free, []
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(Lost):
            # Where this fails, the worker may have said why before it went.
            write_frame(process.stdin, {"id": self._ids, "free": freed, **request}, tuple(tensors))
        while True:
            try:
                header, results = read_frame(process.stdout)
            except Garbled as garbled:
                self.drop()
                raise UserError(f"{self.transport.name} sent what is no answer: {garbled}") from None
            if header.get("id") is None:
                self.drop()
                raise UserError(f"{self.transport.name}: {header.get('error', 'the worker ended.')}")
            if header["id"] != self._ids:
                self.drop()
                raise UserError(f"{self.transport.name} answered another request than it was asked.")
            if "error" in header:
                raise UserError(f"{self.transport.name}: {header['error']}")
            if "event" not in header:
                return header, results
            on_event(header)

    def restore(self) -> None:
        """Back to a working worker, with longer and longer waits. Raises UserError when it does not come back."""
        self.drop()
        note(f"{self.transport.name} was lost; connecting again")
        reason = ""
        for delay in DELAYS_S:
            time.sleep(delay)
            try:
                self._connect()
            except (Lost, UserError) as error:
                reason = str(error)
            else:
                note(f"{self.transport.name} is back")
                return
        raise UserError(
            f"{self.transport.name} was lost and did not come back in {sum(DELAYS_S):g} seconds"
            + (f": {reason}" if reason else ".")
        )

    def drop(self) -> None:
        """End the worker's process."""
        process, self._process = self._process, None
        if process is not None:
            end(process)

    def _connect(self) -> None:
        started = self.transport.start(self._bundle)
        process = started.process
        tail = _Tail(process)
        assert process.stdout is not None
        try:
            read_greeting(process.stdout)
        except (Lost, Garbled) as error:
            noise = error.args[0].decode(errors="replace") if error.args else ""
            end(process, patience_s=1)
            raise UserError(self.transport.explain(process.returncode, tail.text() or noise)) from None
        self._process = process
        weakref.finalize(self, end, process)
        self.epoch += 1
        self.free = []
        self.loaded, _ = self.call({"do": "load", "bundle": started.bundle, "settings": self._settings})


class _Tail:
    """The last of what a process says on stderr; read all the time, so that it never waits for a reader."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self._kept = bytearray()
        self._stream = process.stderr
        self._thread = threading.Thread(target=self._read, daemon=True)
        if self._stream is not None:
            self._thread.start()

    def text(self) -> str:
        """After the process has ended."""
        if self._stream is not None:
            self._thread.join(timeout=1)
        return self._kept.decode(errors="replace").strip()

    def _read(self) -> None:
        assert self._stream is not None
        while chunk := self._stream.read(4096):
            self._kept += chunk
            del self._kept[:-_TAIL_BYTES]


def end(process: subprocess.Popen[bytes], patience_s: float = 3) -> None:
    """A worker ends with its input. One that is busy is not waited for."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
