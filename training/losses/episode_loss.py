"""Loss of episodes: images are written one after another under the questions for their places; one is asked for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from microvlm.memory.ordinal_questions import ORDINALS, ordinal_question
from microvlm.model.memory_algebra import MemoryState
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_ops import full_precision
from microvlm.training.batches.episode_batches import EpisodeBatch
from microvlm.training.batches.sample_texts import CAPTION_PROMPTS, TextRows
from microvlm.training.losses.loss_terms import AnswerLoss, binary_loss


class EpisodeLosses(NamedTuple):
    """Losses of one batch of episodes."""

    loss: Tensor
    """Cross-entropy of the answers."""
    scope: Tensor
    """The scope detector's: every question is known."""
    state: MemoryState
    """The memories after the last write, which other rows of the batch see as distractors."""


def episode_losses(
    module: MicroVLM,
    prefixes: Tensor,
    captions: list[str],
    episodes: EpisodeBatch,
    rows: TextRows,
    cross_entropy: AnswerLoss,
) -> EpisodeLosses:
    """Write and read `episodes` over n images with prefixes [n, k, H] and their captions.

    Every image is encoded once and stands in several episodes.
    """
    values, value_mask, _ = rows.embedded(
        module, [(CAPTION_PROMPTS[0], caption) for caption in captions], prefixes
    )
    latents, _ = module.memory_encode(values, value_mask)
    texts = [(ordinal_question(step), "") for step in range(len(ORDINALS))]
    questions, question_mask, _ = rows.embedded(module, texts, None)
    queries, keys = module.memory_encode(questions, question_mask)
    count, length = episodes.images.shape
    state = MemoryState(*(t.float() for t in module.memory_prior_state(count)))
    with full_precision(latents.device.type):
        latents, keys, queries = latents.float(), keys.float(), queries.float()
        for step in range(length):
            key = keys[step].expand(count, -1)
            latent = latents[torch.from_numpy(episodes.images[:, step])]
            state = MemoryState(*module.memory_write(key, latent, *state))
        steps = torch.from_numpy(episodes.steps)
        _, scope, _, slot = module.memory_read(keys[steps], queries[steps], *state)
    samples = [
        (ordinal_question(int(step)), captions[images[step]])
        for images, step in zip(episodes.images, episodes.steps, strict=True)
    ]
    embeds, mask, labels = rows.embedded(module, samples, None)
    loss = cross_entropy(module, embeds, mask, labels, slot, None)
    return EpisodeLosses(loss, binary_loss(scope, 1.0), state)
