"""Read a memory and choose the entry that the reading points at, on any backend. Says no text and decodes nothing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from microvlm.memory.episodic import EpisodicMemory
from microvlm.memory.pointing.confidence import judge_readings
from microvlm.memory.pointing.encoded_query import EncodedQuery
from microvlm.memory.pointing.evidence import Readings, Rows, point
from microvlm.memory.pointing.log_arrays import rows_of
from microvlm.runtime import MemoryReading, Runtime

NOT_FOUND = "not in this memory"
"""What is said where no entry is pointed at clearly."""


MOST_STATES = 4
"""States that are read for one question: those with the rows whose keys are nearest to it. The log's keys only say
which states are worth reading. What is said is what a reading points at, so an emptied state still says nothing."""


class Pointing(NamedTuple):
    """What one question found in a memory."""

    entry: int | None
    """Index of the entry that answers the question; None where none does clearly."""
    confidence: float
    """Probability that the entry which the reading points at answers the question; 0 where it points at none."""
    reading: MemoryReading
    """Batch 1."""


def find_entry(runtime: Runtime, memory: EpisodicMemory, query: EncodedQuery) -> Pointing:
    """Read `memory` with a query, batch 1, and say which entry its reading points at.

    Of more states, `MOST_STATES` are read, and the surest of their readings counts.
    """
    pointing, prior = runtime.config.memory.pointing, prior_of(runtime)
    log = rows_of(memory)
    best: Pointing | None = None
    for number in candidate_states(query.key, memory, log)[0]:
        reading = runtime.memory_read(query.key, query.latent, memory.state(int(number)))
        state, indices = memory.state(int(number)), memory.rows_of(int(number))
        pointed = point(readings_of(query, reading), state, prior, log, np.array(indices, int))
        row = int(pointed.row[0])
        judged = judge_readings(pointed.evidence, query.has_picture, pointing)
        confidence = float(judged.confidence[0]) if row >= 0 else 0.0
        if best is None:
            best = Pointing(None, 0.0, reading)
        if confidence > best.confidence:
            is_clear = bool(judged.is_clear[0]) and bool(memory.entries[indices[row]].value)
            best = Pointing(indices[row] if is_clear else None, confidence, reading)
    assert best is not None, "a memory has a state"
    return best


def candidate_states(keys: np.ndarray, memory: EpisodicMemory, log: Rows) -> np.ndarray:
    """Indices of at most `MOST_STATES` states for each key [B, K], the one with the nearest row first -> [B, S].

    `log` has the rows of `memory`.
    """
    likeness = np.full((memory.state_count, len(keys)), -2.0)
    if memory.state_count > 1 and memory.entries:
        row_keys = log.keys / np.maximum(np.linalg.norm(log.keys, axis=1, keepdims=True), _TINY)
        states = [entry.memory for entry in memory.entries]
        np.maximum.at(likeness, states, row_keys @ keys.T / np.maximum(np.linalg.norm(keys, axis=1), _TINY))
    return np.argsort(-likeness.T, 1, kind="stable")[:, :MOST_STATES]


_TINY = np.finfo(np.float32).tiny


def prior_of(runtime: Runtime) -> np.ndarray:
    """The mean R0 of an empty memory, float64 [K, C]."""
    return np.asarray(runtime.memory_prior().mean[0], np.float64)


def readings_of(query: EncodedQuery, reading: MemoryReading) -> Readings:
    """Queries and what they read."""
    return Readings(
        query.key, query.latent, reading.latent, reading.scope, query.picture_key, query.question_key
    )
