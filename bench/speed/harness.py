"""Drives one worker process for each backend and model, round by round, so that a drift of the machine hits all alike.

A backend that cannot run, or whose process dies, is reported with its reason; the others go on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from microvlm.backends.base import backend_names, get_backend
from microvlm.bench.records import Figure
from microvlm.bench.speed.phases import phases_to_run
from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.formats import documents

Progress = Callable[[str], None]
T = TypeVar("T")
_REMEDY = "look at what its libraries print to stdout"


class _Error(msgspec.Struct, frozen=True):
    """An answer that is an error; any other has no such entry."""

    error: str | None = None


Memory = dict[str, int | float | str | None]
"""Figures of a process: bytes, and on a device its state."""


class Loaded(msgspec.Struct, frozen=True):
    """The answer to `load`."""

    load_ms: Figure
    import_ms: Figure
    path: str | None = None
    memory_before_load: Memory = {}
    kernels: list[str] = []
    """Names of the products that `kernel` times, where they were asked for."""


class PhaseTime(msgspec.Struct, frozen=True):
    """The answer to `phase` and to `kernel`."""

    ms: Figure


class WorkerFailed(Exception):
    """A worker reported an error that the user can correct (`mendable`), or its process ended. One sentence."""

    def __init__(self, sentence: str, mendable: bool = False):
        super().__init__(sentence)
        self.mendable = mendable


def worker_command(python: str) -> list[str]:
    """The command line of a worker in the environment of an interpreter."""
    # -P: in a checkout, the folder `microvlm` here is not the installed package with all its parts.
    return [python, "-P", "-m", "microvlm.bench.speed.backend_worker"]


class WorkerProcess:
    """A `microvlm.bench.speed.backend_worker` process and its pipe; `command` is another program that answers alike.

    `environment`: variables that it gets beside this process's own.
    """

    def __init__(self, command: list[str] | None = None, environment: Mapping[str, str] | None = None):
        # A file, not a pipe: a library that prints much would fill a pipe that nobody reads, and block.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by `close`
        self._process = subprocess.Popen(
            command or worker_command(sys.executable),
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, kind: type[T], limit_s: float | None = None, **request: Any) -> T:
        """One request, one answer of type `kind`. A process that takes longer than `limit_s` is killed.

        Raises WorkerFailed.
        """
        if limit_s is None:
            return self._ask(kind, request)
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(limit_s, end)
        timer.start()
        try:
            return self._ask(kind, request)
        except WorkerFailed:
            if late.is_set():
                raise WorkerFailed(f"it took longer than {limit_s:g} s and was ended") from None
            raise
        finally:
            timer.cancel()

    def _ask(self, kind: type[T], request: dict[str, Any]) -> T:
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        try:
            pipe_in.write(json.dumps(request) + "\n")
            pipe_in.flush()
            line = pipe_out.readline()
        except OSError:
            line = ""
        if not line:
            raise WorkerFailed(self._describe_end())
        try:
            error = documents.parse(line, _Error, "an answer of its process", _REMEDY).error
            answer = (
                documents.parse(line, kind, "an answer of its process", _REMEDY) if error is None else None
            )
        except UserError as malformed:
            raise WorkerFailed(str(malformed)) from None
        if answer is None:
            raise WorkerFailed(printable(str(error)), mendable=True)
        return answer

    def close(self) -> None:
        """A worker ends when its input does; one that hangs is killed."""
        try:
            self._process.communicate(timeout=30)
        except (subprocess.TimeoutExpired, OSError, ValueError):
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _describe_end(self) -> str:
        code = self._process.wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return f"its process {how}: {lines[-1] if lines else 'it said nothing'}"


@dataclass
class BackendRun:
    """Raw timings of one backend. `reason` is set when it could not run to the end."""

    backend: str
    model: Path = Path()
    label: str = ""
    """Its name in reports: the backend, with the model where there are several."""
    status: str = "ok"
    """`ok`, `skipped` (it cannot run here) or `failed` (it began and broke)."""
    reason: str | None = None
    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    """Milliseconds of each round, by phase."""
    import_ms: list[float] = field(default_factory=list)
    path: str | None = None
    memory: dict[str, int | None] = field(default_factory=dict)
    memory_before_load: dict[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The plan of a measurement: workload, threads, and numbers of timed rounds, warm-up rounds and loads."""

    workload: dict[str, Any]
    threads: int
    repeats: int = 10
    warmup: int = 2
    loads: int = 3
    device: str = "cpu"
    """Of backend `torch`; the others have none to choose."""

    def __post_init__(self) -> None:
        for flag, value in (("--threads", self.threads), ("--repeats", self.repeats)):
            if value < 1:
                raise UserError(f"{flag} is {value}; give 1 or more.")
        if self.warmup < 0:
            raise UserError(f"--warmup is {self.warmup}; give 0 or more.")


def measure(
    backends: Sequence[str],
    models: Sequence[Path],
    plan: Plan,
    progress: Progress = lambda _: None,
    spawn: Callable[[], WorkerProcess] = WorkerProcess,
) -> list[BackendRun]:
    """Every model on every backend over every phase, `plan.repeats` times, interleaved.

    Raises UserError for an unknown backend.
    """
    labels = [f"{model.name}, {name}" if len(models) > 1 else name for model in models for name in backends]
    pairs = [(model, name) for model in models for name in backends]
    runs = [_initial_run(name, model, label) for (model, name), label in zip(pairs, labels, strict=True)]
    workers: dict[int, WorkerProcess] = {}
    try:
        for attempt in range(plan.loads):
            progress(f"loading, {attempt + 1} of {plan.loads}")
            for number, run in _running(runs):
                worker = spawn()
                workers[number] = worker
                _guarded(run, partial(_load, run, worker, plan, attempt < plan.loads - 1))
                if attempt < plan.loads - 1:
                    worker.close()
        for index in range(plan.warmup + plan.repeats):
            progress(f"round {index + 1} of {plan.warmup + plan.repeats}")
            for phase in phases_to_run():
                for number, run in _running(runs):
                    counts = index >= plan.warmup
                    _guarded(run, partial(_time_phase, run, workers[number], phase, index, counts))
        for number, run in _running(runs):
            _guarded(run, partial(_measure_memory, run, workers[number]))
    finally:
        for worker in workers.values():
            worker.close()
    return runs


def _initial_run(name: str, model: Path, label: str) -> BackendRun:
    """A run whose status says whether the backend is available here. Raises UserError for an unregistered name."""
    run = BackendRun(name, model, label)
    registered = name in backend_names()
    try:
        run.reason = get_backend(name).unavailable()
    except UserError as error:
        if not registered:
            raise
        run.reason = str(error)
    if run.reason is not None:
        run.status = "skipped"
    return run


def _running(runs: list[BackendRun]) -> list[tuple[int, BackendRun]]:
    return [(number, run) for number, run in enumerate(runs) if run.status == "ok"]


def _load(run: BackendRun, worker: WorkerProcess, plan: Plan, measure_only_load: bool) -> None:
    answer = worker.ask(
        Loaded,
        do="load",
        backend=run.backend,
        model=str(run.model),
        threads=plan.threads,
        device=plan.device,
        workload=plan.workload,
        measure_only_load=measure_only_load,
    )
    run.milliseconds.setdefault("load", []).append(answer.load_ms)
    run.import_ms.append(answer.import_ms)
    run.path = answer.path
    run.memory_before_load = bytes_of(answer.memory_before_load)


def _time_phase(run: BackendRun, worker: WorkerProcess, phase: str, index: int, counts: bool) -> None:
    milliseconds = worker.ask(PhaseTime, do="phase", phase=phase, index=index).ms
    if counts:
        run.milliseconds.setdefault(phase, []).append(milliseconds)


def _measure_memory(run: BackendRun, worker: WorkerProcess) -> None:
    run.memory = bytes_of(worker.ask(Memory, do="memory"))


def bytes_of(memory: Memory) -> dict[str, int | None]:
    """The figures that are numbers of bytes."""
    return {
        name: int(value) if isinstance(value, int) else None
        for name, value in memory.items()
        if name.endswith("_bytes")
    }


def _guarded(run: BackendRun, action: Callable[[], None]) -> None:
    """Run `action`; an error that the user can correct makes the run `skipped`, a dead process `failed`."""
    try:
        action()
    except WorkerFailed as failure:
        run.status, run.reason = ("skipped" if failure.mendable else "failed"), str(failure)
