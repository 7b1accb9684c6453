"""Attention guidance: teaches two heads of the decoder how a question's word finds its object in the picture.

"where is the lion?" takes two look-ups: from the word to the prefix embeddings over its object, and from the answer's
position to the word. Cross-entropy on the answer alone finds them only by luck, because neither helps without the
other. The loss of each is -log of the attention that one head pays to the target (the supervision of Liu et al. 2016,
arXiv 1609.04186, applied to self-attention). It leaves no trace in the saved model but its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from microvlm.model.attention import attention_weights
from microvlm.model.decoder import Decoder, DecoderLayer, SelfAttention

GUIDED_HEAD = 0
WORD_LAYER, ANSWER_LAYER = 1, 2
"""Layers, from 0, of the look-up from a word to its object and of that from the answer's position to the word."""


@dataclass(frozen=True)
class Lookups:
    """Position `queries[i]` of batch row `rows[i]` should attend to the true columns of `targets[i]`."""

    rows: Tensor
    """int64 [n]."""
    queries: Tensor
    """int64 [n], positions in the row."""
    targets: Tensor
    """bool [n, T], the first T positions in the row; at least one is true."""

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> Lookups:
        return Lookups(self.rows.to(device), self.queries.to(device), self.targets.to(device))

    @classmethod
    def build(cls, entries: list[tuple[int, int, np.ndarray]], width: int) -> Lookups:
        """Look-ups from (row, query position, target positions); `width` exceeds every target position."""
        targets = torch.zeros(len(entries), width, dtype=torch.bool)
        for target, (_, _, columns) in zip(targets, entries, strict=True):
            target[torch.from_numpy(columns)] = True
        rows, queries = ([entry[part] for entry in entries] for part in (0, 1))
        return cls(torch.tensor(rows, dtype=torch.long), torch.tensor(queries, dtype=torch.long), targets)


class AttentionTap:
    """Records the arguments of each guided layer's attention; use it as a context around a forward pass."""

    def __init__(self, decoder: Decoder):
        self.layers = {
            index: cast(SelfAttention, cast(DecoderLayer, decoder.layers[index]).self_attn)
            for index in (WORD_LAYER, ANSWER_LAYER)
        }
        self.arguments: dict[int, tuple[Any, ...]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> AttentionTap:
        for index, attention in self.layers.items():
            hook = lambda _module, args, index=index: self.arguments.__setitem__(index, args)  # noqa: E731
            self._handles.append(cast(nn.Module, attention).register_forward_pre_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def loss(self, layer: int, lookups: Lookups) -> Tensor:
        """Mean of -log(attention of the guided head on its targets) over the look-ups."""
        x, cos, sin, mask, (past, _) = self.arguments[layer]
        x, cos, sin, mask, past = (part[lookups.rows] for part in (x, cos, sin, mask, past))
        query, key, _ = self.layers[layer].heads(x, cos, sin)
        each = torch.arange(len(lookups), device=x.device)
        queries = query[each, :, lookups.queries][:, GUIDED_HEAD : GUIDED_HEAD + 1, None]
        visible = mask[each, :, lookups.queries][:, :, None]
        groups = query.shape[1] // key.shape[1]
        keys = torch.cat([past.to(key.dtype), key], 2)[:, GUIDED_HEAD // groups][:, None]
        weights = attention_weights(queries, keys, visible)[:, 0, 0].float()
        # Column 0 is the memory slot's.
        reached = (weights[:, 1 : 1 + lookups.targets.shape[1]] * lookups.targets).sum(1)
        return -reached.clamp(min=1e-6).log().mean()
