"""`python -m microvlm.backends.arm64.device.worker` runs a bundle's graphs for a host that writes frames to stdin.

Answers go to stdout, output of libraries to stderr. The worker ends when stdin ends. README.md lists the requests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from microvlm.backends.arm64.device import machine_facts
from microvlm.backends.arm64.device.supervisor import Activity, supervise
from microvlm.backends.arm64.device_errors import PACKAGES, DamagedCopyError
from microvlm.backends.arm64.frames import (
    GREETING,
    ConnectionLost,
    FrameError,
    Tensor,
    read_frame,
    write_frame,
)
from microvlm.errors import UserError

Answer = tuple[dict[str, Any], tuple[Tensor, ...]]


class Worker:
    """Answers requests, one at a time. `send` writes a frame before the answer; the parent reads `activity`."""

    def __init__(self, activity: Activity, send: Callable[[dict[str, Any]], None]):
        self._activity, self._send = activity, send
        self._server: Any = None

    def answer(self, request: dict[str, Any], tensors: list[Tensor]) -> Answer:
        """Answer one request. Raises UserError for mistakes that the user can correct."""
        action = request.get("do")
        if self._server is not None:
            self._server.release(_numbers(request.get("free", [])))
        if action == "load":
            return self._load(request)
        if action == "condition":
            return {**machine_facts.condition(), "values": self._server.count if self._server else 0}, ()
        if self._server is None:
            raise UserError("the worker needs a bundle first: send `load`.")
        self._activity.set(f"running {request.get('graph', action)}")
        return self._server.answer(request, tensors)

    def _load(self, request: dict[str, Any]) -> Answer:
        refusal = machine_facts.onnxruntime_refusal()
        if refusal is not None:
            raise UserError(refusal)
        self._activity.set(f"importing onnxruntime {machine_facts.installed_version('onnxruntime')}")
        try:
            import onnxruntime  # noqa: F401

            from microvlm.backends.arm64 import messages
            from microvlm.backends.arm64.device.graph_server import GraphServer
        except Exception as error:
            # Files that a power cut emptied raise many kinds of exceptions.
            cause = f"{type(error).__name__}: {error}"
            raise DamagedCopyError(f"a Python package cannot be imported ({cause}).", PACKAGES) from error

        self._activity.set("loading the bundle")
        load = messages.parse(request, messages.Load, "a request to the device")
        self._server = GraphServer(Path(load.bundle), load.settings, self._send)
        return {
            "device": machine_facts.describe(),
            "kernels": self._server.kernels,
            "threads": self._server.threads,
        }, ()


def _numbers(value: Any) -> list[int]:
    """A list of numbers; anything else frees nothing."""
    return [number for number in value if type(number) is int] if isinstance(value, list) else []


def serve(requests: IO[bytes], answers: IO[bytes], activity: Activity) -> int:
    """Answer requests until they end -> exit status. A defect's traceback goes to stderr, its last line to the host."""
    current: dict[str, Any] = {}
    worker = Worker(activity, lambda header: write_frame(answers, {"id": current.get("id"), **header}))
    try:
        while True:
            activity.set("waiting")
            current, tensors = read_frame(requests)
            try:
                header, results = worker.answer(current, tensors)
            except DamagedCopyError as error:
                header, results = {"error": str(error), "damaged": error.part}, ()
            except UserError as error:
                header, results = {"error": str(error)}, ()
            except ConnectionLost:
                raise
            except Exception as error:
                import traceback

                traceback.print_exc()
                header, results = {"error": f"the worker failed: {type(error).__name__}: {error}"}, ()
            write_frame(answers, {"id": current.get("id"), **header}, results)
    except ConnectionLost:
        return 0
    except FrameError as garbled:
        write_frame(answers, {"id": None, "error": f"the worker could not read a request: {garbled}"})
        return 1


def main() -> int:
    """Keep stdin and stdout for frames: print() goes to stderr."""
    requests, answers = (os.fdopen(os.dup(number), mode, 0) for number, mode in ((0, "rb"), (1, "wb")))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    answers.write(GREETING + b"\n")

    def report_death(sentence: str) -> None:
        write_frame(answers, {"id": None, "error": sentence})

    return supervise(lambda activity: serve(requests, answers, activity), report_death)


if __name__ == "__main__":
    sys.exit(main())
