"""One worker at the other end of a transport: started, asked, and started again when it is lost.

Knows frames and requests, no graphs. A request is answered before the next one is sent.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from microvlm.backends.arm64.device_errors import PACKAGES, Damaged
from microvlm.backends.arm64.frames import (
    Garbled,
    Lost,
    OtherVersion,
    Tensor,
    read_frame,
    read_greeting,
    write_frame,
)
from microvlm.backends.arm64.transports.worker_process import Child
from microvlm.console import note
from microvlm.errors import UserError

DELAYS_S = (0.5, 1, 2, 4, 8, 16)
"""Waited before each try to come back."""
EXCEPTION = 1
"""Exit status of a Python that an exception ended."""
Event = Callable[[dict[str, Any]], None]


class Transport(Protocol):
    """How a worker is started."""

    name: str
    """As the user would type it after --target."""

    def start(self, bundle: Path) -> tuple[Child, str]:
        """(a worker that has not greeted yet, the bundle's folder as it sees it). Raises UserError, or Lost."""
        ...

    def explain(self, status: int, said: str) -> str:
        """One sentence for a worker that ended with `status` before it greeted, with what was said on stderr."""
        ...

    def mend(self, damage: Damaged) -> None:
        """The next start brings anew what is damaged. Raises UserError where it can't, or did so already."""
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
        self._child: Child | None = None
        self._ids = 0
        try:
            self._connect()
        except Lost:
            self.restore()

    @property
    def is_up(self) -> bool:
        return self._child is not None

    @property
    def pid(self) -> int | None:
        """Of the worker's process here, or of the program that leads to it."""
        return None if self._child is None else self._child.pid

    def call(
        self, request: dict[str, Any], tensors: Sequence[Tensor] = (), on_event: Event = lambda _: None
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """The answer; frames before it go to `on_event`. Raises Lost, and UserError for what the worker refused."""
        if self._child is None:
            raise Lost
        self._ids += 1
        freed, self.free = self.free, []
        header = {"id": self._ids, "free": freed, **request}
        try:
            return ask(self._child, header, tensors, on_event)
        except (Garbled, BrokenWorker) as error:
            self.drop()
            raise UserError(f"{self.transport.name}: {error}") from None
        except UserError as error:
            error.args = (f"{self.transport.name}: {error}",)
            raise
        except BaseException:
            # Interrupted or lost: what the worker still sends is no answer to the next request.
            self.drop()
            raise

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
        after = f"{self.transport.name} was lost and did not come back in {sum(DELAYS_S):g} seconds"
        raise UserError(f"{after}: {reason}" if reason else f"{after}.")

    def drop(self) -> None:
        """End the worker."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def _connect(self) -> None:
        while True:
            try:
                return self._start()
            except Damaged as damage:
                self.drop()
                self.transport.mend(damage)

    def _start(self) -> None:
        child, bundle = self.transport.start(self._bundle)
        try:
            greet(child, self.transport.explain)
        except Unstarted as error:
            if error.status == EXCEPTION:
                raise Damaged(str(error), PACKAGES) from None
            raise
        self._child = child
        self.epoch += 1
        self.free = []
        self.loaded, _ = self.call({"do": "load", "bundle": bundle, "settings": self._settings})


class Unstarted(UserError):
    """A process ended, with `status`, instead of greeting."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class BrokenWorker(Exception):
    """The worker has ended or is out of step; its last words, one sentence."""


def greet(child: Child, explain: Callable[[int, str], str]) -> None:
    """Waits for the greeting. Raises Unstarted with what `explain` makes of a process that ended instead, and UserError
    for one of another version."""
    try:
        read_greeting(child.answers)
    except OtherVersion as error:
        child.end(patience_s=1)
        raise UserError(str(error)) from None
    except (Lost, Garbled) as error:
        printed = error.args[0].decode(errors="replace") if error.args else ""
        # It is about to end by itself, with the status that tells why.
        status = child.end(patience_s=10)
        raise Unstarted(explain(status, child.said() or printed), status) from None


def ask(
    child: Child, header: dict[str, Any], tensors: Sequence[Tensor] = (), on_event: Event = lambda _: None
) -> tuple[dict[str, Any], list[Tensor]]:
    """One request and its answer. Raises Lost, Garbled, BrokenWorker, and UserError for what was refused:
    Damaged where a worker can't use what it was given."""
    with contextlib.suppress(Lost):
        # Where this fails, the worker may have said why before it went.
        write_frame(child.requests, header, tuple(tensors))
    while True:
        answer, results = read_frame(child.answers)
        if answer.get("id") is None:
            raise BrokenWorker(answer.get("error", "the worker ended."))
        if answer["id"] != header["id"]:
            raise BrokenWorker("it answered another request than it was asked.")
        if "damaged" in answer:
            raise Damaged(answer["error"], answer["damaged"])
        if "error" in answer:
            raise UserError(answer["error"])
        if "event" not in answer:
            return answer, results
        on_event(answer)
