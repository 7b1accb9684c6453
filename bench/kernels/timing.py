"""Times one cell: one sample of every contender at each setting in each round, in a new order each round.

A setting that was far slower than its contender's best while warming up is left out of the rounds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from microvlm.bench.kernels.contenders import Contender
from microvlm.bench.kernels.sessions import SPIN_PAUSE_S, Runner, Setting
from microvlm.bench.kernels.workload import Plan, Shape
from microvlm.bench.stats import median

HOPELESS = 3.0
"""A setting this many times slower than the contender's best, while warming up, is not measured further."""
_SAMPLE_S = {"hot": 0.002, "dram": 0.006}
"""A sample repeats short runs for about this long, so that neither the clock nor the waking of a thread shows."""
_MOST_REPEATS = 64


@dataclass
class Timing:
    """One contender at one setting in one cell. Milliseconds are of one pass over the shape, not of its copies."""

    contender: Contender
    setting: Setting
    weight_bytes: int
    """Bytes of the shape's weights in this format."""
    run_bytes: int
    """Bytes that one run reads; they tell whether the weights fit a cache."""
    warm_ms: float
    ms: list[float] = field(default_factory=list)
    """Milliseconds of each round; empty where the setting was hopeless."""

    @property
    def median_ms(self) -> float:
        return median(self.ms) if self.ms else self.warm_ms


@dataclass
class Cell:
    shape: Shape
    regime: str
    threads: int
    batch: int
    timings: list[Timing]

    def best(self, name: str) -> Timing | None:
        """A contender at its best setting, or None where it was not measured."""
        timed = [timing for timing in self.timings if timing.contender.name == name and timing.ms]
        return min(timed, key=lambda timing: timing.median_ms, default=None)


def time_cell(
    shape: Shape, regime: str, threads: int, batch: int, runners: Sequence[Runner], plan: Plan
) -> Cell:
    """Warm every runner up on `batch` tokens, then run the rounds that fit in `plan.seconds`."""
    x = np.random.default_rng(2).standard_normal((batch, shape.inputs), np.float32)
    timings = [_warmed(runner, x) for runner in runners]
    cell = Cell(shape, regime, threads, batch, timings)
    best: dict[str, float] = {}
    for timing in timings:
        name = timing.contender.name
        best[name] = min(timing.warm_ms, best.get(name, timing.warm_ms))
    measured = [
        (runner, timing, _repeats(runner, timing.warm_ms, regime))
        for runner, timing in zip(runners, timings, strict=True)
        if timing.warm_ms <= HOPELESS * best[timing.contender.name]
    ]
    round_s = sum(timing.warm_ms * 1e-3 * runner.copies * repeats for runner, timing, repeats in measured)
    rounds = int(plan.seconds / round_s) if measured else 0
    order = random.Random(0)
    for _ in range(min(max(rounds, plan.least_rounds), plan.most_rounds)):
        order.shuffle(measured)
        for runner, timing, repeats in measured:
            if regime == "hot":
                runner.run()  # what the others threw out of the cache is read again before the clock
            timing.ms.append(_pass_ms(runner, repeats))
    return cell


def _warmed(runner: Runner, x: np.ndarray) -> Timing:
    """Bind, run once untimed and twice timed."""
    runner.bind(x)
    _pass_ms(runner, 1)
    ms = min(_pass_ms(runner, 1) for _ in range(2))
    each = runner.weight_bytes // runner.copies
    return Timing(runner.contender, runner.setting, each, runner.weight_bytes, ms)


def _pass_ms(runner: Runner, repeats: int) -> float:
    """Milliseconds of one pass over the shape, from `repeats` runs over all its copies."""
    began = time.perf_counter()
    for _ in range(repeats):
        runner.run()
    seconds = time.perf_counter() - began
    if runner.setting.spinning:
        time.sleep(SPIN_PAUSE_S)  # the next contender needs the cores
    return seconds * 1e3 / repeats / runner.copies


def _repeats(runner: Runner, pass_ms: float, regime: str) -> int:
    run_s = pass_ms * 1e-3 * runner.copies
    return max(1, min(_MOST_REPEATS, round(_SAMPLE_S[regime] / run_s)))
