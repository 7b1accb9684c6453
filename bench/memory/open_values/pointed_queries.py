"""Where questions point in a memory, many at once: the evidence that the confidence is fitted to and scored by."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from microvlm.bench.memory.model_under_test import ModelUnderTest
from microvlm.configuration.pointing import EVIDENCE, PointingWeights
from microvlm.generation import repeat_memory
from microvlm.memory.episodic import EpisodicMemory
from microvlm.memory.pointing.confidence import confidence_of
from microvlm.memory.pointing.evidence import Readings
from microvlm.memory.pointing.pointer import candidate_states, point_at, prior_of

BATCH = 16


class PointedQueries(NamedTuple):
    """N questions, each read from S states."""

    entries: np.ndarray
    """int [N, S], index of the entry pointed at; -1 for none."""
    evidence: np.ndarray
    """float64 [N, S, len(EVIDENCE)]."""

    def surest(self, weights: PointingWeights) -> tuple[np.ndarray, np.ndarray]:
        """(entry [N], confidence [N]) of the surest state, as `find_entry` takes it; (-1, 0) for none."""
        confidence = np.where(self.entries < 0, 0.0, confidence_of(self.evidence, weights))
        each, best = np.arange(len(confidence)), confidence.argmax(1)
        return self.entries[each, best], confidence[each, best]


def point_queries(
    model: ModelUnderTest, memory: EpisodicMemory, keys: np.ndarray, latents: np.ndarray
) -> PointedQueries:
    """Where questions with keys [N, K] and latents [N, C] point."""
    chosen, prior = candidate_states(keys, memory), prior_of(model.runtime)
    entries, evidence = np.full(chosen.shape, -1), np.zeros((*chosen.shape, len(EVIDENCE)))
    for number in np.unique(chosen):
        indices = np.array([*memory.rows_of(int(number)), -1])
        asked, places = np.nonzero(chosen == number)
        for start in range(0, len(asked), BATCH):
            part, place = asked[start : start + BATCH], places[start : start + BATCH]
            state = repeat_memory(memory.state(int(number)), len(part))
            reading = model.runtime.memory_read(keys[part], latents[part], state)
            readings = Readings(keys[part], latents[part], reading.latent, reading.scope)
            pointed = point_at(memory, int(number), readings, prior)
            entries[part, place], evidence[part, place] = indices[pointed.row], pointed.evidence
    return PointedQueries(entries, evidence)
