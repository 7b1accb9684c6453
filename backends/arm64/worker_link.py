"""Starts a worker over a transport, sends it requests, and starts another one when it is lost.

Handles frames and requests, no graphs. A request is answered before the next one is sent.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from microvlm.backends.arm64 import messages
from microvlm.backends.arm64.device_errors import PACKAGES, DamagedCopyError
from microvlm.backends.arm64.frames import (
    ConnectionLost,
    FrameError,
    Tensor,
    VersionMismatch,
    read_frame,
    read_greeting,
    write_frame,
)
from microvlm.backends.arm64.transports.worker_process import WorkerProcess
from microvlm.console import note
from microvlm.errors import UserError
from microvlm.escaping import printable

DELAYS_S = (0.5, 1, 2, 4, 8, 16)
"""Seconds to wait before each attempt to connect again."""
EXCEPTION_STATUS = 1
"""Exit status of Python after an uncaught exception."""
Event = Callable[[dict[str, Any]], None]


class Transport(Protocol):
    """A way to start a worker on a device."""

    name: str
    """The target as the user types it after --target."""

    def start(self, bundle: Path) -> tuple[WorkerProcess, str]:
        """-> (a worker that has not greeted yet, the bundle's folder on its side). Raises UserError, ConnectionLost."""
        ...

    def explain(self, status: int, stderr: str) -> str:
        """One sentence for a worker that ended with `status` before it greeted, after printing `stderr`."""
        ...

    def mend(self, damage: DamagedCopyError) -> None:
        """Make the next start send the damaged part again. Raises UserError where it can't, or did so already."""
        ...


class WorkerLink:
    """A connection to one worker, which the constructor starts. Raises UserError."""

    def __init__(self, transport: Transport, bundle: Path, settings: dict[str, Any]):
        self.transport = transport
        self.epoch = 0
        """Number of the present worker; values of earlier ones are lost."""
        self.free: list[int] = []
        """Numbers of values that are not needed any more; the next request frees them."""
        self._loaded: messages.Loaded | None = None
        self._bundle, self._settings = bundle, settings
        self._process: WorkerProcess | None = None
        self._ids = 0
        try:
            self._connect()
        except ConnectionLost:
            self.restore()

    @property
    def loaded(self) -> messages.Loaded:
        """The worker's answer to `load`: its device, kernels and threads."""
        assert self._loaded is not None  # the constructor has loaded the bundle
        return self._loaded

    @property
    def origin(self) -> str:
        """Whose answers are read, for errors."""
        return f"an answer of {self.transport.name}"

    @property
    def is_up(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """Process id, on the host, of the worker or of the program (ssh, QEMU) that leads to it."""
        return None if self._process is None else self._process.pid

    def call(
        self, request: dict[str, Any], tensors: Sequence[Tensor] = (), on_event: Event = lambda _: None
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """Send a request -> the answer; frames before it go to `on_event`.

        Raises ConnectionLost, and UserError where the worker refuses the request.
        """
        if self._process is None:
            raise ConnectionLost
        self._ids += 1
        freed, self.free = self.free, []
        header = {"id": self._ids, "free": freed, **request}
        try:
            return exchange(self._process, header, tensors, on_event)
        except (FrameError, BrokenWorker) as error:
            self.drop()
            raise UserError(f"{self.transport.name}: {error}") from None
        except UserError as error:
            error.args = (f"{self.transport.name}: {error}",)
            raise
        except BaseException:
            # Interrupted or lost: frames that the worker still sends must not answer the next request.
            self.drop()
            raise

    def restore(self) -> None:
        """Start another worker, after waits of DELAYS_S. Raises UserError where none of the attempts succeeds."""
        self.drop()
        note(f"{self.transport.name} was lost; connecting again")
        reason = ""
        for delay in DELAYS_S:
            time.sleep(delay)
            try:
                self._connect()
            except (ConnectionLost, UserError) as error:
                reason = str(error)
            else:
                note(f"{self.transport.name} is back")
                return
        after = f"{self.transport.name} was lost and did not come back in {sum(DELAYS_S):g} seconds"
        raise UserError(f"{after}: {reason}" if reason else f"{after}.")

    def drop(self) -> None:
        """End the worker."""
        process, self._process = self._process, None
        if process is not None:
            process.end()

    def _connect(self) -> None:
        while True:
            try:
                return self._start()
            except DamagedCopyError as damage:
                self.drop()
                self.transport.mend(damage)

    def _start(self) -> None:
        process, bundle = self.transport.start(self._bundle)
        try:
            await_greeting(process, self.transport.explain)
        except WorkerNotStarted as error:
            if error.status == EXCEPTION_STATUS:
                raise DamagedCopyError(str(error), PACKAGES) from None
            raise
        self._process = process
        self.epoch += 1
        self.free = []
        answer, _ = self.call({"do": "load", "bundle": bundle, "settings": self._settings})
        self._loaded = messages.parse(answer, messages.Loaded, self.origin)


class WorkerNotStarted(UserError):
    """A worker's process ended, with `status`, before it greeted."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class BrokenWorker(Exception):
    """The worker ended or answered out of order; the message is its last sentence."""


def await_greeting(process: WorkerProcess, explain: Callable[[int, str], str]) -> None:
    """Wait for the worker's greeting.

    Raises WorkerNotStarted, with the sentence of `explain`, for a process that ended instead, and UserError for
    another protocol version.
    """
    try:
        read_greeting(process.answers)
    except VersionMismatch as error:
        process.end(patience_s=1)
        raise UserError(str(error)) from None
    except (ConnectionLost, FrameError) as error:
        printed = printable(error.args[0].decode(errors="replace")) if error.args else ""
        # The process is about to end by itself; its status tells why.
        status = process.end(patience_s=10)
        raise WorkerNotStarted(explain(status, process.stderr_text() or printed), status) from None


def exchange(
    process: WorkerProcess,
    header: dict[str, Any],
    tensors: Sequence[Tensor] = (),
    on_event: Event = lambda _: None,
) -> tuple[dict[str, Any], list[Tensor]]:
    """Send one request -> (answer, its tensors).

    Raises ConnectionLost, FrameError, BrokenWorker, UserError where the worker refuses the request, and
    DamagedCopyError where its bundle or packages are damaged.
    """
    with contextlib.suppress(ConnectionLost):
        # Where writing fails, the worker may have sent the reason before it ended.
        write_frame(process.requests, header, tuple(tensors))
    while True:
        answer, results = read_frame(process.answers)
        try:
            reply = messages.parse(answer, messages.Reply, "its answer")
        except UserError as error:
            raise BrokenWorker(str(error)) from None
        if reply.id is None:
            raise BrokenWorker(reply.sentence)
        if reply.id != header["id"]:
            raise BrokenWorker("its answer belongs to another request.")
        if reply.damaged is not None:
            raise DamagedCopyError(reply.sentence, reply.damaged)
        if reply.error is not None:
            raise UserError(reply.sentence)
        if reply.event is None:
            return answer, results
        on_event(answer)
