"""Episodes over one memory: pictures are written one after another, and a question reads one of them.

The memory has three states for the model: on (what was written), off (its slot is masked) and empty (the prior is
read). Training with all three keeps the model right in each (Larimar, arXiv 2403.11901, section 3.3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from microvlm.memory.ordinal_questions import ORDINALS, ordinal_question
from microvlm.model.decoder import Cache
from microvlm.model.memory_algebra import MemoryState, addressing_kl, memory_kl
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_ops import full_precision
from microvlm.training.batches.caption_batches import MASKED, CaptionBatch, Episodes
from microvlm.training.batches.conversation_rows import ConversationRows
from microvlm.training.losses.gathering import gather_rows


class EpisodeReading(NamedTuple):
    """What the n questions of this process's episodes read."""

    slot: Cache
    scope: Tensor
    """Probability that the memory answers the question, [n]."""
    state: MemoryState
    """After the last write, of all m episodes that this process holds."""
    keys: Tensor
    """Keys of the ordinal questions under which pictures are written, [L, K]."""
    memory_kl: Tensor
    addressing_kl: Tensor


def read_episodes(
    model: MicroVLM,
    rows: ConversationRows,
    batch: CaptionBatch,
    episodes: Episodes,
    prefixes: Tensor,
    image_id: int,
    log_variance: float,
    noisy: bool = True,
    group: Any = None,
) -> EpisodeReading:
    """Write the captioned pictures of `batch` with prefixes [C, k, H] and read each episode's question.

    Keys of the questions get Gaussian noise of variance e^log_variance where `noisy`, from the batch itself. An episode
    may write the pictures of other processes, whose latents come through `group`.
    """
    device, share = prefixes.device, batch.share
    captions = batch.captions.to(device)
    latents, _ = model.memory_encode(model.place_images(captions.ids, image_id, prefixes), captions.mask)
    if share.processes > 1:
        places = torch.from_numpy(share.caption_places()).to(device)
        latents = gather_rows(latents, share.caption_counts(), group)[places]
    length = episodes.written.shape[1]
    ordinals = rows.prompts([ordinal_question(min(step, len(ORDINALS) - 1)) for step in range(length)]).to(
        device
    )
    _, write_keys = model.memory_encode(model.embed(ordinals.ids), ordinals.mask)
    questions = episodes.questions.to(device)
    queries, keys = model.memory_encode(model.embed(questions.ids), questions.mask)
    count, asked = len(episodes.written), len(questions.ids)
    state = MemoryState(*(part.float() for part in model.memory_prior_state(count)))
    with full_precision(device.type):
        latents, write_keys, queries, keys = (part.float() for part in (latents, write_keys, queries, keys))
        written = torch.from_numpy(episodes.written).to(device)
        for step in range(length):
            picture = written[:, step]
            is_written = (picture >= 0).to(latents.dtype)[:, None]
            # A row of zeros changes nothing: shorter episodes end earlier.
            key = write_keys[step].expand(count, -1) * is_written
            state = MemoryState(*model.memory_write(key, latents[picture.clamp(min=0)] * is_written, *state))
        variance = torch.tensor(log_variance, device=device)
        kl = addressing_kl(keys, variance)
        if noisy:
            keys = keys + (0.5 * variance).exp() * episodes.noise.to(device)
        read = MemoryState(*(part[:asked] for part in state))
        _, scope, _, slot = model.memory_read(keys, queries, *read)
        divergence = memory_kl(read, model.memory_prior.float())
    return EpisodeReading(slot, scope, state, write_keys, divergence, kl)


def slots_of_rows(
    model: MicroVLM, visible: Tensor, queries: tuple[Tensor, Tensor], others: MemoryState | None
) -> tuple[Cache, Tensor, Tensor]:
    """The memory slot of each row, which rows see it, and the scope detector's probabilities of those.

    visible : int64 [B], MASKED, EMPTY or an index into `others`. queries : latents [B, C] and keys [B, K] of the rows'
    prompts. others : the memories of the batch's episodes.
    """
    latent, key = queries
    mean, covariance = (part.float() for part in model.memory_reset(len(visible)))
    if others is not None:
        chosen, has_other = visible.clamp(min=0), (visible >= 0)[:, None, None]
        mean = torch.where(has_other, others.mean.detach()[chosen], mean)
        covariance = torch.where(has_other, others.covariance.detach()[chosen], covariance)
    with full_precision(visible.device.type):
        _, scope, _, slot = model.memory_read(key.float(), latent.float(), mean, covariance)
    sees = visible > MASKED
    return slot, sees.long(), scope[sees]


def utilization(keys: Tensor) -> float:
    """Share of the K slots that keys [n, K] use: exp(entropy of the mean absolute weights) / K."""
    weights = keys.detach().abs().float().mean(0)
    weights = weights / weights.sum().clamp(min=1e-12)
    return float((-(weights * weights.clamp(min=1e-12).log()).sum()).exp() / keys.shape[1])
