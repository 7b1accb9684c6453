"""`python -m microvlm.backends.arm64.device.worker` runs a bundle's graphs for whoever writes frames to its stdin.

Its answers go to stdout, what a library prints to stderr. It ends with its stdin. Requests are in README.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from microvlm.backends.arm64.device import machine_facts
from microvlm.backends.arm64.device.supervisor import Doing, supervise
from microvlm.backends.arm64.device_errors import PACKAGES, Damaged
from microvlm.backends.arm64.frames import GREETING, Garbled, Lost, Tensor, read_frame, write_frame
from microvlm.errors import UserError

Answer = tuple[dict[str, Any], tuple[Tensor, ...]]


class Worker:
    """Answers requests, one at a time; `send` writes a frame before the answer, `doing` says what is under way."""

    def __init__(self, doing: Doing, send: Callable[[dict[str, Any]], None]):
        self._doing, self._send = doing, send
        self._host: Any = None

    def answer(self, request: dict[str, Any], tensors: list[Tensor]) -> Answer:
        """Raises UserError for what the user can mend."""
        what = request.get("do")
        if self._host is not None:
            self._host.release(request.get("free", ()))
        if what == "load":
            return self._load(request)
        if what == "condition":
            return {**machine_facts.condition(), "values": self._host.count if self._host else 0}, ()
        if self._host is None:
            raise UserError("the worker was asked to work before it was given a bundle.")
        self._doing.set(f"running {request.get('graph', what)}")
        return self._host.answer(request, tensors)

    def _load(self, request: dict[str, Any]) -> Answer:
        refusal = machine_facts.onnxruntime_refusal()
        if refusal is not None:
            raise UserError(refusal)
        self._doing.set(f"importing onnxruntime {machine_facts.installed_version('onnxruntime')}")
        try:
            import onnxruntime  # noqa: F401

            from microvlm.backends.arm64.device.graph_host import GraphHost
        except Exception as error:
            # Files that a power cut emptied fail in many ways.
            cause = f"{type(error).__name__}: {error}"
            raise Damaged(f"a Python package cannot be imported ({cause}).", PACKAGES) from error

        self._doing.set("loading the bundle")
        self._host = GraphHost(Path(request["bundle"]), request.get("settings", {}), self._send)
        return {
            "device": machine_facts.describe(),
            "kernels": self._host.kernels,
            "threads": self._host.threads,
        }, ()


def serve(requests: IO[bytes], answers: IO[bytes], doing: Doing) -> int:
    """Until the requests end -> exit status. A defect's traceback goes to stderr and its last line into the answer."""
    current: dict[str, Any] = {}
    worker = Worker(doing, lambda header: write_frame(answers, {"id": current.get("id"), **header}))
    try:
        while True:
            doing.set("waiting")
            current, tensors = read_frame(requests)
            try:
                header, results = worker.answer(current, tensors)
            except Damaged as error:
                header, results = {"error": str(error), "damaged": error.what}, ()
            except UserError as error:
                header, results = {"error": str(error)}, ()
            except Lost:
                raise
            except Exception as error:
                import traceback

                traceback.print_exc()
                header, results = {"error": f"the worker failed: {type(error).__name__}: {error}"}, ()
            write_frame(answers, {"id": current.get("id"), **header}, results)
    except Lost:
        return 0
    except Garbled as garbled:
        write_frame(answers, {"id": None, "error": f"the worker could not read a request: {garbled}"})
        return 1


def main() -> int:
    """Frames keep the two pipes to themselves: print() must not reach them."""
    requests, answers = (os.fdopen(os.dup(number), mode, 0) for number, mode in ((0, "rb"), (1, "wb")))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    answers.write(GREETING + b"\n")

    def bury(sentence: str) -> None:
        write_frame(answers, {"id": None, "error": sentence})

    return supervise(lambda doing: serve(requests, answers, doing), bury)


if __name__ == "__main__":
    sys.exit(main())
