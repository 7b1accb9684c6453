"""The order in which programs are measured, and the processes that run them: fresh ones for each number of threads.

All programs of one number of threads are loaded before the first round. Each phase of a round goes through all of them,
one after the other, and every round begins with another one, so that nobody always runs behind the same neighbour.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from microvlm.bench.records import PositiveFigure
from microvlm.bench.speed.harness import Memory, Progress, WorkerFailed, WorkerProcess, bytes_of
from microvlm.errors import UserError
from microvlm.formats.documents import Count

PREFILL, DECODE = "prefill", "decode"
PHASES = (PREFILL, DECODE)
PROMPT_TOKENS = 64
ANSWER_LIMIT_S = 60.0
"""Seconds that a phase may take: threads that spin at a barrier take minutes where other programs use the cores."""
LOAD_LIMIT_S = 300.0
"""Seconds of loading, in which torch also compiles."""
_WARM_UP_TOKENS = 2
_WORKER = [sys.executable, "-P", "-m", "microvlm.bench.peers.peer_worker"]


class PeerLoaded(msgspec.Struct, frozen=True):
    """The worker's answer to `load`."""

    version: str
    kernels: str
    """What computes the products, in the program's own words."""
    weight_bytes: Count | None = None
    """Bytes of weights of a decoded token, where the program holds them in memory of its own."""


class PeerTimes(msgspec.Struct, frozen=True):
    """The worker's answer to `round`."""

    prefill_ms: PositiveFigure
    """Of the whole prompt."""
    decode_ms: PositiveFigure | None
    """Of one token, the mean of all; None where none was decoded."""


class Turn(NamedTuple):
    """One measurement: which phase of which program."""

    round: int
    phase: str
    place: int
    """Of the program in the list of all."""


@dataclass(frozen=True)
class Contender:
    """A program with the weights that it reads."""

    name: str
    """As tables call it."""
    adapter: str
    """An entry of `peer_worker.ADAPTERS`."""
    weights: str
    """Types or bits of its weights."""
    file: str
    """Name of the file or folder; random weights have none."""
    options: dict[str, Any]
    """What its adapter is made with."""
    weight_bytes: int | None = None
    """Bytes of weights that a decoded token reads, where the file says it."""
    is_ours: bool = False
    missing: str | None = None
    """Why it cannot be measured here, in a sentence."""


@dataclass(frozen=True)
class PeerPlan:
    """Threads to measure with, timed rounds, and tokens of a decode."""

    threads: tuple[int, ...] = (1, 2)
    rounds: int = 10
    new_tokens: int = 16

    def __post_init__(self) -> None:
        for flag, least in (
            ("--threads", min(self.threads, default=0)),
            ("--rounds", self.rounds),
            ("--new-tokens", self.new_tokens),
        ):
            if least < 1:
                raise UserError(f"{flag} is {least}; give 1 or more.")


@dataclass
class PeerRun:
    """Raw timings of a program at one number of threads."""

    contender: Contender
    threads: int
    status: str = "ok"
    """`ok`, `skipped` (it cannot run here) or `failed` (it began and broke)."""
    reason: str | None = None
    loaded: PeerLoaded | None = None
    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    """Of each round by phase: of the whole prompt, and of a token."""
    memory: dict[str, int | None] = field(default_factory=dict)


def turns(programs: int, rounds: int) -> Iterator[Turn]:
    """Every measurement in its order; a round begins one program later than the round before."""
    for number in range(rounds):
        for phase in PHASES:
            for step in range(programs):
                yield Turn(number, phase, (number + step) % programs)


def take_turns(
    contenders: Sequence[Contender], plan: PeerPlan, progress: Progress = lambda _: None
) -> list[PeerRun]:
    """Measure all contenders with each number of threads. One that cannot run has its reason; the others go on."""
    return [run for threads in plan.threads for run in _block(contenders, threads, plan, progress)]


def _block(
    contenders: Sequence[Contender], threads: int, plan: PeerPlan, progress: Progress
) -> list[PeerRun]:
    runs = [_first_state(contender, threads) for contender in contenders]
    workers: dict[int, WorkerProcess] = {}
    try:
        for place, run in enumerate(runs):
            if run.status == "ok":
                progress(f"{threads} thread{'s' * (threads > 1)}: loading {run.contender.name}")
                workers[place] = WorkerProcess(_WORKER)
                _guarded(run, partial(_load, run, workers[place]))
        shown = -1
        for turn in turns(len(runs), plan.rounds):
            if turn.round != shown:
                shown = turn.round
                progress(f"{threads} thread{'s' * (threads > 1)}: round {shown + 1} of {plan.rounds}")
            run = runs[turn.place]
            if run.status == "ok":
                _guarded(run, partial(_measure, run, workers[turn.place], turn.phase, plan.new_tokens))
        for place, run in enumerate(runs):
            if run.status == "ok":
                _guarded(run, partial(_read_memory, run, workers[place]))
    finally:
        for worker in workers.values():
            worker.close()
    return runs


def _first_state(contender: Contender, threads: int) -> PeerRun:
    run = PeerRun(contender, threads)
    if contender.missing is not None:
        run.status, run.reason = "skipped", contender.missing
    return run


def _load(run: PeerRun, worker: WorkerProcess) -> None:
    run.loaded = worker.ask(
        PeerLoaded,
        limit_s=LOAD_LIMIT_S,
        do="load",
        adapter=run.contender.adapter,
        threads=run.threads,
        prompt_tokens=PROMPT_TOKENS,
        options=run.contender.options,
    )
    worker.ask(PeerTimes, limit_s=LOAD_LIMIT_S, do="round", new_tokens=_WARM_UP_TOKENS)


def _measure(run: PeerRun, worker: WorkerProcess, phase: str, new_tokens: int) -> None:
    tokens = new_tokens if phase == DECODE else 0
    times = worker.ask(PeerTimes, limit_s=ANSWER_LIMIT_S, do="round", new_tokens=tokens)
    value = times.decode_ms if phase == DECODE else times.prefill_ms
    if value is None:
        raise WorkerFailed("it decoded nothing")
    run.milliseconds.setdefault(phase, []).append(value)


def _read_memory(run: PeerRun, worker: WorkerProcess) -> None:
    run.memory = bytes_of(worker.ask(Memory, limit_s=ANSWER_LIMIT_S, do="memory"))


def _guarded(run: PeerRun, action: Callable[[], None]) -> None:
    """Run `action`; an error that the user can correct makes the run `skipped`, a dead process `failed`."""
    try:
        action()
    except WorkerFailed as failure:
        run.status, run.reason = ("skipped" if failure.mendable else "failed"), str(failure)


def file_name(path: Path) -> str:
    """A file or a folder as a document names it: without where this machine keeps it."""
    return path.resolve().name
