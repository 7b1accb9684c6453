"""Spells the names of a convolutional encoder's classes in the tokens of another decoder.

A MicroVLM with such an encoder holds the names as embeddings of its own tokens (`adapter.GridAdapter`). They are read
back as text and written in the new decoder's tokens, so that an assembled model can copy names before it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from microvlm.config import MicroVLMConfig
from microvlm.inputs.processor import Processor
from microvlm.model.pretrained.float_weights import float_weights

NAMES = "adapter.names.weight"
_EMBEDDING = "embedding.weight"


def read_names(folder: Path) -> list[str]:
    """The name of each class of a checkpoint with `name_pieces`, "" for a class without one.

    A name that is longer than its embeddings ends where they do. Raises UserError for a damaged checkpoint.
    """
    config, processor = MicroVLMConfig.load(folder), Processor.from_pretrained(folder)
    weights = float_weights(folder)
    spelled = weights[NAMES].T.unflatten(1, (config.vision.name_pieces, -1))
    is_spelled = spelled.abs().amax(-1) > 0
    table = F.normalize(weights[_EMBEDDING], dim=-1)
    # The embeddings of a trained table point elsewhere each: the nearest one is the token itself.
    tokens = torch.stack(
        [(F.normalize(piece, dim=-1) @ table.T).argmax(-1) for piece in spelled.unbind(1)], 1
    )
    ends = set(processor.stop_tokens)
    rows = [
        [token for token, has in zip(row, there, strict=True) if has and token not in ends]
        for row, there in zip(tokens.tolist(), is_spelled.tolist(), strict=True)
    ]
    return [processor.decode(row).strip() if row else "" for row in rows]


def spell_names(names: Sequence[str], pieces: int, processor: Processor, table: Tensor) -> Tensor:
    """The adapter's `names` for these classes, float32 [pieces x H, classes], from a token table [V, H].

    A name begins with a blank, as inside of a sentence, and ends with the token that ends an answer where there is
    room; zeros follow.
    """
    spelled = torch.zeros(len(names), pieces, table.shape[1])
    for number, name in enumerate(names):
        ids = [*processor.text_ids(name, after_blank=True), processor.eos_id][:pieces] if name else []
        spelled[number, : len(ids)] = table[ids].float()
    return spelled.flatten(1).T.contiguous()
