"""Runs two sides in turns: pairs of fresh processes, and rounds within each pair. Judges nothing.

Which side goes first changes from pair to pair and from round to round, so that neither always finds the caches that
the other left.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from microvlm.backends.native import SWITCH
from microvlm.bench.comparison.energy import EnergyCounter
from microvlm.bench.speed.harness import Loaded, PhaseTime, WorkerFailed, WorkerProcess, worker_command
from microvlm.bench.speed.phases import phases_to_run
from microvlm.errors import UserError

Progress = Callable[[str], None]
LOAD, ENERGY = "load", "energy"
KERNEL_SAMPLES = 4
"""Samples of a product in a round: they are short, and phases are not."""
ENERGY_S = 0.5
"""A sample of energy repeats `end_to_end` for about this long: counters move every millisecond."""


@dataclass(frozen=True)
class Side:
    """What one side runs: a bundle on a backend, and where the code comes from."""

    name: str
    """A or B."""
    bundle: Path
    backend: str
    library: Path | None = None
    """Another native library than the package's."""
    python: str | None = None
    """The interpreter of another environment, such as one with another version of the package."""

    def __post_init__(self) -> None:
        flag = self.name.lower()
        if self.library is not None and not self.library.is_file():
            raise UserError(f"--library-{flag} {self.library} is no file: give the path of a native library.")
        if self.python is not None and not os.access(self.python, os.X_OK):
            raise UserError(f"--python-{flag} {self.python} is no program: give the path of an interpreter.")

    def start(self) -> WorkerProcess:
        environment = {} if self.library is None else {SWITCH: str(self.library.resolve())}
        return WorkerProcess(worker_command(self.python or sys.executable), environment)


@dataclass(frozen=True)
class Turns:
    """How often: pairs of fresh processes, timed rounds within a pair, rounds before the clock counts."""

    workload: dict[str, Any]
    threads: int = 1
    pairs: int = 10
    rounds: int = 16
    warmup: int = 1


@dataclass
class Samples:
    """Milliseconds by quantity: float64 [pairs, samples, 2], A before B. Energy is in joules, apart."""

    ms: dict[str, np.ndarray] = field(default_factory=dict)
    joules: np.ndarray | None = None
    """Of one `end_to_end`, float64 [pairs, 1, 2]; None where the machine exposes no counter."""
    paths: tuple[str, str] = ("", "")
    """The code that ran the quantised layers, of both sides."""


def take_turns(a: Side, b: Side, turns: Turns, progress: Progress = lambda _: None) -> Samples:
    """Measure both sides. Raises UserError for a side that cannot run or whose process ends."""
    energy = EnergyCounter.find()
    pairs = []
    for number in range(turns.pairs):
        progress(f"pair {number + 1} of {turns.pairs}")
        with closing(a.start()) as first, closing(b.start()) as second:
            pair = _Pair((a, b), (first, second), turns, number)
            pairs.append(pair.measure(energy))
    names = [name for name in pairs[0] if name != ENERGY]
    return Samples(
        {name: np.stack([pair[name] for pair in pairs]) for name in names},
        np.stack([pair[ENERGY] for pair in pairs]) if energy is not None else None,
        pair.paths,
    )


class _Pair:
    """Two running processes, one a side."""

    def __init__(
        self,
        sides: tuple[Side, Side],
        workers: tuple[WorkerProcess, WorkerProcess],
        turns: Turns,
        number: int,
    ):
        self._sides, self._workers, self._turns, self._number = sides, workers, turns, number
        self.paths = ("", "")

    def measure(self, energy: EnergyCounter | None) -> dict[str, np.ndarray]:
        """Milliseconds by quantity, float64 [samples, 2]; `load` and energy have one sample."""
        loaded = self._in_turns(0, self._load)
        self.paths = (loaded[0].path or "", loaded[1].path or "")
        # Of an installation that is older, or without the library, there is nothing to compare kernels with.
        kernels = [name for name in loaded[0].kernels if name in loaded[1].kernels]
        samples: dict[str, list[list[float]]] = {LOAD: [[answer.load_ms for answer in loaded]]}
        quantities = [(phase, partial(self._phase, phase=phase)) for phase in phases_to_run()]
        quantities += [(name, partial(self._kernel, name=name)) for name in kernels]
        for index in range(self._turns.warmup + self._turns.rounds):
            for name, measure in quantities:
                for turn in range(KERNEL_SAMPLES if name in kernels else 1):
                    both = self._in_turns(index + turn, partial(measure, index=index))
                    if index >= self._turns.warmup:
                        samples.setdefault(name, []).append(both)
        if energy is not None:
            samples[ENERGY] = [self._in_turns(0, partial(self._energy, counter=energy))]
        return {name: np.asarray(rows, np.float64) for name, rows in samples.items()}

    def _in_turns(self, index: int, measure: Callable[[int], Any]) -> list[Any]:
        """One measurement of each side, A's first in the list whichever was measured first."""
        order = (0, 1) if (self._number + index) % 2 == 0 else (1, 0)
        answers: list[Any] = [None, None]
        for place in order:
            try:
                answers[place] = measure(place)
            except WorkerFailed as failure:
                raise UserError(f"side {self._sides[place].name} cannot be measured: {failure}") from None
        return answers

    def _load(self, place: int) -> Loaded:
        side, turns = self._sides[place], self._turns
        return self._workers[place].ask(
            Loaded,
            do="load",
            backend=side.backend,
            model=str(side.bundle),
            threads=turns.threads,
            device="cpu",
            workload=turns.workload,
            measure_only_load=False,
            kernels=True,
        )

    def _phase(self, place: int, phase: str, index: int) -> float:
        return self._workers[place].ask(PhaseTime, do="phase", phase=phase, index=index).ms

    def _kernel(self, place: int, name: str, index: int) -> float:
        return self._workers[place].ask(PhaseTime, do="kernel", name=name, index=index).ms

    def _energy(self, place: int, counter: EnergyCounter) -> float:
        """Joules of one caption: the whole processor's, the idle rest of the machine included."""
        once_ms = self._phase(place, "end_to_end", 0)
        repeats = max(1, round(ENERGY_S * 1e3 / once_ms))
        counter.joules()
        for index in range(repeats):
            self._phase(place, "end_to_end", index)
        return counter.joules() / repeats
