"""One backend in its own process: `python -m microvlm.bench.speed.backend_worker`. JSON lines in, JSON lines out.

The first request loads the model, each later one runs one phase once, the last reads this process's memory. What a
library prints goes to stderr, so that the pipe carries answers only. An error that the user can correct is an answer.
Requests are our own harness's: parsing them by types would import modules that belong to what is measured.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from microvlm.errors import UserError


class Worker:
    """Answers requests, one dict each. Raises UserError for what the user can correct."""

    def __init__(self) -> None:
        self._runner: Any = None
        self._runtime: Any = None
        self._kernels: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        return getattr(self, f"_{request['do']}")(request)

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Imports are timed apart: an application pays for them once, and they are the libraries', not the model's."""
        from microvlm.backends import get_backend
        from microvlm.bench.provenance import kernels_of, memory_of_this_process
        from microvlm.bench.speed.phases import PhaseRunner, Workload
        from microvlm.inputs.processor import Processor
        from microvlm.runtime import OpensAhead, RunsElsewhere

        began = time.perf_counter()
        backend = get_backend(request["backend"])
        reason = backend.unavailable()
        if reason is not None:
            raise UserError(reason)
        for library in backend.libraries:
            importlib.import_module(library)
        imported_ms = (time.perf_counter() - began) * 1e3
        before = memory_of_this_process()
        began = time.perf_counter()
        options = {} if request["device"] == "cpu" else {"device": request["device"]}
        runtime = self._runtime = backend.load(request["model"], request["threads"], **options)
        if isinstance(runtime, OpensAhead):
            # Else a part of loading would count for the phase that comes first.
            runtime.open_ahead()
        load_ms = (time.perf_counter() - began) * 1e3
        loaded = {
            "load_ms": load_ms,
            "import_ms": imported_ms,
            "path": kernels_of(runtime),
            # On a device, the memory before loading is not known here.
            "memory_before_load": {} if isinstance(runtime, RunsElsewhere) else before,
        }
        if request["measure_only_load"]:
            return loaded
        if request.get("kernels"):
            # Only where they are asked for: its weights would count as the model's memory.
            from microvlm.bench.comparison.kernel_timer import KernelTimer

            self._kernels = KernelTimer(Path(request["model"]))
            loaded["kernels"] = self._kernels.names
        work = request["workload"]
        workload = Workload(
            tuple(work["images"]), tuple(work["captions"]), work["question"], work["new_tokens"]
        )
        self._runner = PhaseRunner(runtime, Processor.from_pretrained(request["model"]), workload)
        return loaded

    def _phase(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"ms": self._runner.run(request["phase"], request["index"])}

    def _kernel(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"ms": self._kernels.run(request["name"])}

    def _memory(self, request: dict[str, Any]) -> dict[str, Any]:
        """Memory of the process that runs the graphs: this one, or a device's."""
        from microvlm.bench.provenance import memory_of_this_process
        from microvlm.runtime import RunsElsewhere

        if isinstance(self._runtime, RunsElsewhere):
            return dict(self._runtime.condition())
        return dict(memory_of_this_process())


def serve(worker: Any) -> None:
    """Answer every line of stdin by `worker.answer` until it ends. A UserError is an answer with `error`."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except UserError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    serve(Worker())
