"""Measures how far a float32 state drifts from float64 in a long random sequence of writes, overwrites and forgets.

The backend does the steps, in its own buffers where it holds states; the float64 state follows by numpy.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.in_place import HeldMemory, hold
from microvlm.runtime import MemoryArrays, Runtime

STEPS = 1000


class Step(NamedTuple):
    """One operation: removes the row at `place` of the log, adds row `new` of the pool; -1 where it does not."""

    name: str
    place: int
    new: int


def drift(
    runtime: Runtime, keys: np.ndarray, latents: np.ndarray, steps: int = STEPS, seed: int = 0
) -> dict[str, Any]:
    """keys [N, K], latents [N, C]: the rows that the sequence draws from, N > 1; none is in the state twice at once.

    `float32_vs_float64` is the largest difference of a number of mean or covariance after `steps` operations of an
    `EpisodicMemory`, which builds a state anew after K forgotten rows; `without_rebuilds` that of the same operations
    where nothing is built anew; `after_rebuild` where the log is written anew at the end.
    """
    pool = [Entry(str(number), *row, time=0.0) for number, row in enumerate(zip(keys, latents, strict=True))]
    memory, prior = EpisodicMemory.empty(runtime), runtime.memory_prior()
    never_rebuilt = hold(runtime, prior)
    exact = MemoryArrays(*(part[0].astype(np.float64) for part in prior))
    variance = runtime.config.memory.observation_variance
    plan = plan_steps(len(pool), memory.slots, steps, seed)
    for step in plan:
        old = memory.entries[step.place] if step.place >= 0 else None
        new = pool[step.new] if step.new >= 0 else None
        if old is not None:
            exact = exact_write(exact, old, -variance)
        if new is not None:
            exact = exact_write(exact, new, variance)
        _apply(never_rebuilt, old, new)
        if old is None and new is not None:
            memory.write(runtime, new)
        elif new is None:
            memory.forget(runtime, step.place)
        else:
            memory.overwrite(runtime, step.place, new)
    table = {
        "steps": steps,
        **{f"{name}s": count for name, count in sorted(Counter(step.name for step in plan).items())},
        "float32_vs_float64": distance(memory.states[0], exact),
        "without_rebuilds": distance(never_rebuilt.state, exact),
    }
    memory.rebuild(runtime)
    return {**table, "after_rebuild": distance(memory.states[0], exact)}


def plan_steps(pool: int, slots: int, steps: int, seed: int = 0) -> list[Step]:
    """A random sequence that fills a state and then changes it: more writes than forgets while there is room."""
    rng = np.random.default_rng(seed)
    live: list[int] = []
    plan = []
    for _ in range(steps):
        draw, place = rng.random(), int(rng.integers(len(live))) if live else -1
        if len(live) < min(slots, pool - 1) and (draw < 0.6 or not live):
            plan.append(Step("write", -1, _fresh(rng, pool, live)))
            live.append(plan[-1].new)
        elif draw < 0.8:
            plan.append(Step("forget", place, -1))
            del live[place]
        else:
            plan.append(Step("overwrite", place, _fresh(rng, pool, live)))
            live[place] = plan[-1].new
    return plan


def exact_write(state: MemoryArrays, row: Entry, variance: float) -> MemoryArrays:
    """`memory_algebra.write` in float64, mean [K, C] and covariance [K, K]; of a negative variance, `forget`."""
    key, latent = row.key.astype(np.float64), row.latent.astype(np.float64)
    spread = state.covariance @ key
    gain = spread / (key @ spread + variance)
    return MemoryArrays(
        state.mean + np.outer(gain, latent - key @ state.mean), state.covariance - np.outer(spread, gain)
    )


def distance(state: MemoryArrays, exact: MemoryArrays) -> float:
    """The largest difference of a number: a state [1, K, ...] from one [K, ...]."""
    return max(float(np.abs(part[0] - true).max()) for part, true in zip(state, exact, strict=True))


def _apply(held_memory: HeldMemory, old: Entry | None, new: Entry | None) -> None:
    if old is None and new is not None:
        held_memory.write(*new.row)
    elif old is not None and new is None:
        held_memory.forget(*old.row)
    elif old is not None and new is not None:
        held_memory.overwrite(*old.row, *new.row)


def _fresh(rng: np.random.Generator, pool: int, live: list[int]) -> int:
    return int(rng.choice(np.setdiff1d(np.arange(pool), live)))
