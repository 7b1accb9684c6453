"""Encodes facts into memory latents and keys, and writes them into memories."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from microvlm.model.memory_algebra import MemoryState, batch_solution
from microvlm.model.microvlm import MicroVLM
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.emoji.batches.fact_batches import FactBatch


class FactLatents(NamedTuple):
    """Latents [F, C] and keys [F, K] of F facts, float32."""

    write_key: Tensor
    """Key of the question that the fact is written under."""
    value: Tensor
    """Latent of that question with its answer: what is written."""
    value_key: Tensor
    """Key of `value`."""
    query: Tensor
    """Latent of the question that reads the fact."""
    query_key: Tensor
    """Key of `query`."""


def encode_texts(
    module: MicroVLM, rows: TextRows, samples: list[tuple[str, str]], prefixes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Encode (prompt, answer or "") pairs, each with its image prefix [n, k, H] or None -> (latent [n, C], key [n, K]).

    Both are float32.
    """
    embeds, mask, _ = rows.embedded(module, samples, prefixes)
    latent, key = module.memory_encode(embeds, mask)
    return latent.float(), key.float()


def encode_facts(module: MicroVLM, batch: FactBatch, prefixes: Tensor, rows: TextRows) -> FactLatents:
    """Encode a batch of facts; `prefixes` [2 * len(pictured), k, H] belong to `batch.views`."""
    write_views, read_views = prefixes.split(len(batch.pictured))
    parts = []
    for facts, views in (
        (batch.pictured, torch.cat([write_views, write_views, read_views])),
        (batch.text_only, None),
    ):
        if facts:
            samples = [(fact.write_question, "") for fact in facts]
            samples += [(fact.write_question, fact.value) for fact in facts]
            samples += [(fact.read_question, "") for fact in facts]
            latents, keys = encode_texts(module, rows, samples, views)
            _, value, query = latents.split(len(facts))
            write_key, value_key, query_key = keys.split(len(facts))
            parts.append((write_key, value, value_key, query, query_key))
    return FactLatents(*map(torch.cat, zip(*parts, strict=True)))


def write_memories(module: MicroVLM, key: Tensor, value: Tensor, batch: FactBatch) -> MemoryState:
    """Write the `written` facts of each group into a memory of its own: key [F, K], value [F, C] -> [G, K, C].

    Uses the batch ridge solution, which equals writing the facts one after another.
    """
    written_rows = np.flatnonzero(batch.is_written)
    group = batch.group[written_rows]
    counts = np.bincount(group, minlength=batch.group.max() + 1)
    # The place of each fact among those of its memory.
    order = np.argsort(group, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows, memory, slot = (torch.from_numpy(part).to(key.device) for part in (written_rows, group, place))
    keys, values = (
        part.new_zeros(len(counts), int(counts.max()), part.shape[1]).index_put((memory, slot), part[rows])
        for part in (key, value)
    )
    prior = module.memory_prior_state().mean[0].float()
    return batch_solution(prior, keys, values, module.config.memory.observation_variance)


def outside_key_space(module: MicroVLM, latent: Tensor, key: Tensor) -> Tensor:
    """The part of latents [F, C] that their keys [F, K] do not determine, [F, C]: what the scope detector compares."""
    return latent - key @ module.memory_encoder.pseudo_inverse.T
