"""Episodes: images written one after the other, each under the question of its place; one of them is asked for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from microvlm.memory.ordinal_questions import ORDINALS, ordinal_question
from microvlm.model.decoder import Cache
from microvlm.model.memory_algebra import MemoryState
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_ops import full_precision
from microvlm.training.batches.sample_texts import CAPTION_PROMPTS, IGNORED, TextRows
from microvlm.training.losses.fact_loss import CrossEntropy, binary_loss

MAX_EPISODE = 8


class Episodes(NamedTuple):
    """What the episodes of a batch gave."""

    loss: Tensor
    scope: Tensor
    state: MemoryState
    """The memories after the last write, for other rows to be distracted by."""


def answer_loss(label_smoothing: float) -> CrossEntropy:
    """Mean cross-entropy of a batch's answers; the slot [B] and the rows that see it, None for all."""

    def cross_entropy(
        module: MicroVLM, embeds: Tensor, mask: Tensor, labels: Tensor, slot: Cache, seen: Tensor | None
    ) -> Tensor:
        wanted = labels != IGNORED
        logits = module(embeds, mask, slot, seen, wanted)
        return F.cross_entropy(logits.float(), labels[wanted], label_smoothing=label_smoothing)

    return cross_entropy


def recall_episodes(
    module: MicroVLM,
    prefixes: Tensor,
    names: list[str],
    rows: TextRows,
    cross_entropy: CrossEntropy,
    rng: np.random.Generator,
) -> Episodes:
    """prefixes [n, k, H] of the images `names` -> n episodes of two to eight of them.

    Every image of the batch is encoded once and stands in several episodes.
    """
    told = [(CAPTION_PROMPTS[0], name) for name in names]
    values, value_mask, _ = rows.embedded(module, told, prefixes)
    codes, _ = module.memory_encode(values, value_mask)
    texts = [(ordinal_question(step), "") for step in range(len(ORDINALS))]
    questions, question_mask, _ = rows.embedded(module, texts, None)
    query_codes, keys = module.memory_encode(questions, question_mask)
    length = int(rng.integers(2, min(MAX_EPISODE, len(names)) + 1))
    shown = np.stack([rng.permutation(len(names))[:length] for _ in names])
    asked = rng.integers(0, length, len(names))
    state = MemoryState(*(t.float() for t in module.memory_prior_state(len(names))))
    with full_precision(codes.device.type):
        codes, keys, query_codes = codes.float(), keys.float(), query_codes.float()
        for step in range(length):
            key = keys[step].expand(len(names), -1)
            state = MemoryState(*module.memory_write(key, codes[torch.from_numpy(shown[:, step])], *state))
        places = torch.from_numpy(asked)
        _, scope, _, slot = module.memory_read(keys[places], query_codes[places], *state)
    answers = [names[row[step]] for row, step in zip(shown, asked, strict=True)]
    samples = [(ordinal_question(int(step)), name) for step, name in zip(asked, answers, strict=True)]
    embeds, mask, labels = rows.embedded(module, samples, None)
    loss = cross_entropy(module, embeds, mask, labels, slot, None)
    return Episodes(loss, binary_loss(scope, 1.0), state)
