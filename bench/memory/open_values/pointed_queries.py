"""Where questions point in a memory, many at once: the evidence that the confidence is fitted to and scored by."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from microvlm.bench.memory.model_under_test import ModelUnderTest
from microvlm.configuration.pointing import EVIDENCE, PointingConfig
from microvlm.generation import repeat_memory
from microvlm.memory.episodic import EpisodicMemory
from microvlm.memory.pointing.confidence import judge_readings
from microvlm.memory.pointing.encoded_query import EncodedQuery
from microvlm.memory.pointing.evidence import point
from microvlm.memory.pointing.log_arrays import rows_of
from microvlm.memory.pointing.pointer import candidate_states, prior_of, readings_of

BATCH = 16


class Surest(NamedTuple):
    """What `find_entry` finds of N queries."""

    entries: np.ndarray
    """int [N]; -1 for none."""
    confidence: np.ndarray
    """float64 [N]; 0 for none."""
    is_said: np.ndarray
    """bool [N], whether the entry's text is."""


class PointedQueries(NamedTuple):
    """N queries, each read from S states."""

    entries: np.ndarray
    """int [N, S], index of the entry pointed at; -1 for none."""
    evidence: np.ndarray
    """float64 [N, S, len(EVIDENCE)]."""
    has_picture: np.ndarray
    """bool [N]."""

    def surest(self, pointing: PointingConfig) -> Surest:
        """The surest reading of each."""
        judged = judge_readings(self.evidence, self.has_picture[:, None], pointing)
        confidence = np.where(self.entries < 0, 0.0, judged.confidence)
        each, best = np.arange(len(confidence)), confidence.argmax(1)
        is_said = judged.is_clear[each, best] & (self.entries[each, best] >= 0)
        return Surest(self.entries[each, best], confidence[each, best], is_said)


def point_queries(model: ModelUnderTest, memory: EpisodicMemory, queries: EncodedQuery) -> PointedQueries:
    """Where N queries point."""
    log, prior = rows_of(memory), prior_of(model.runtime)
    chosen = candidate_states(queries.key, memory, log)
    entries, evidence = np.full(chosen.shape, -1), np.zeros((*chosen.shape, len(EVIDENCE)))
    for number in np.unique(chosen):
        indices, state = np.array(memory.rows_of(int(number)), int), memory.state(int(number))
        asked, places = np.nonzero(chosen == number)
        for start in range(0, len(asked), BATCH):
            part, place = asked[start : start + BATCH], places[start : start + BATCH]
            batch = queries.rows(part)
            reading = model.runtime.memory_read(batch.key, batch.latent, repeat_memory(state, len(part)))
            pointed = point(readings_of(batch, reading), state, prior, log, indices)
            entries[part, place] = np.append(indices, -1)[pointed.row]
            evidence[part, place] = pointed.evidence
    return PointedQueries(entries, evidence, queries.has_picture)
