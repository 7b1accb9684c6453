"""Thousands of facts written one after another, some of them forgotten: what is still known, and what it costs.

Every fact is asked for with its own words and another view of its picture. Each FORGET_EVERYth write is followed by
forgetting a random live fact.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from microvlm.bench.memory.model_under_test import ModelUnderTest
from microvlm.bench.memory.personalisation.concept_sets import Concept, made_up_names
from microvlm.bench.stats import median, wilson
from microvlm.memory.facts import FactMemory, FactReading

FORGET_EVERY = 4
ASKED = 100
"""Live facts, and forgotten ones, that are asked for at each point of the curve."""
Progress = Callable[[str], None]


class StreamedFact(NamedTuple):
    """What one name says about one object."""

    concept: Concept
    question: str
    text: str


def points(writes: int) -> list[int]:
    """Numbers of writes after which facts are asked for: 100, 300, 1000, ... up to `writes`, which is the last."""
    steps = [factor * 10**power for power in range(2, 9) for factor in (1, 3)]
    return sorted({step for step in steps if step < writes} | {writes})


def fact_stream(
    model: ModelUnderTest, concepts: Sequence[Concept], writes: int, seed: int, progress: Progress
) -> list[dict[str, Any]]:
    """A row for each of `points(writes)`.

    `recall`: of the live facts that are asked for, those whose own text comes from the memory; `wrong`: those with
    another text from it. `forgotten`: of forgotten facts, those whose text does not come back. Times are medians since
    the row before; `read_ms` includes encoding the question. `state_bytes` are those of all states, `file_bytes` those
    of the saved memory.
    """
    rng = np.random.default_rng(seed)
    facts, source = FactMemory(model.runtime, model.processor), stream(concepts, rng)
    live: list[StreamedFact] = []
    forgotten: list[StreamedFact] = []
    rows, times = [], _Times()
    for count in points(writes):
        while times.written < count:
            fact = next(source)
            times.write(partial(facts.write, fact.text, fact.question, fact.concept.written))
            live.append(fact)
            if times.written % FORGET_EVERY == 0:
                index = int(rng.integers(len(live)))
                times.forget(partial(facts.forget, index))
                forgotten.append(live.pop(index))
        progress(f"{count} facts written, {len(forgotten)} forgotten")
        rows.append(_row(model, facts, live, forgotten, times, rng))
        times.restart()
    return rows


def stream(concepts: Sequence[Concept], rng: np.random.Generator) -> Iterator[StreamedFact]:
    """Facts whose question and object together never come twice, in a random order of objects."""
    while True:
        for index in rng.permutation(len(concepts)):
            name, text = made_up_names(2, rng)
            yield StreamedFact(concepts[index], f"what did {name} say about this?", text)


def _row(
    model: ModelUnderTest,
    facts: FactMemory,
    live: Sequence[StreamedFact],
    forgotten: Sequence[StreamedFact],
    times: _Times,
    rng: np.random.Generator,
) -> dict[str, Any]:
    normalize = model.processor.normalize_text

    def ask(fact: StreamedFact) -> FactReading:
        return times.read(lambda: facts.read(fact.question, fact.concept.asked, model.options))

    def says(reading: FactReading, fact: StreamedFact) -> bool:
        return reading.from_memory and normalize(reading.answer) == normalize(fact.text)

    asked = [live[int(i)] for i in rng.permutation(len(live))[:ASKED]]
    gone = [forgotten[int(i)] for i in rng.permutation(len(forgotten))[:ASKED]]
    readings = [ask(fact) for fact in asked]
    right = [says(reading, fact) for reading, fact in zip(readings, asked, strict=True)]
    wrong = [reading.from_memory and not own for reading, own in zip(readings, right, strict=True)]
    stays = sum(not says(ask(fact), fact) for fact in gone)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stream.mem"
        facts.save(path)
        file_bytes = path.stat().st_size
    return {
        "writes": times.written,
        "live": len(live),
        "asked": len(asked),
        "recall": sum(right) / len(asked),
        "recall_ci95": wilson(sum(right), len(asked)),
        "wrong": sum(wrong) / len(asked),
        "forgotten_asked": len(gone),
        "forgotten": stays / len(gone) if gone else None,
        "memories": facts.memory.state_count,
        **times.medians(),
        "state_bytes": sum(s.mean.nbytes + s.covariance.nbytes for s in facts.memory.states),
        "file_bytes": file_bytes,
    }


class _Times:
    """Milliseconds of each operation since the last `restart`."""

    def __init__(self) -> None:
        self.written = 0
        self.restart()

    def restart(self) -> None:
        self._ms: dict[str, list[float]] = {"write": [], "forget": [], "read": []}

    def write(self, action: Callable[[], Any]) -> None:
        self._time("write", action)
        self.written += 1

    def forget(self, action: Callable[[], Any]) -> None:
        self._time("forget", action)

    def read(self, action: Callable[[], FactReading]) -> FactReading:
        reading: FactReading = self._time("read", action)
        return reading

    def medians(self) -> dict[str, float | None]:
        """`write_ms`, `forget_ms` and `read_ms`."""
        return {f"{name}_ms": round(median(ms), 3) if ms else None for name, ms in self._ms.items()}

    def _time(self, name: str, action: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = action()
        self._ms[name].append(1000 * (time.perf_counter() - began))
        return result
