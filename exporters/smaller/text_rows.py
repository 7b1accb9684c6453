"""Samples as rows of tokens, and the logits of a model at the tokens that are scored. One model, one tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from microvlm.exporters.smaller.samples import Sample
from microvlm.inputs.processor import Processor
from microvlm.model.microvlm import MicroVLM

BATCH = 8
Item = TypeVar("Item")


class Row(NamedTuple):
    """One sample's tokens."""

    ids: list[int]
    scored: list[int]
    """Indices in `ids` of the tokens that are predicted from those before them."""
    places: list[int]
    """Of each scored token, where it begins: in bytes of the scored text, or in tokens."""
    picture: int | None
    """Index of its features."""


class Reader:
    """A model and its tokenizer, which scores rows."""

    def __init__(self, model: MicroVLM, processor: Processor, token_bytes: np.ndarray | None = None):
        """`token_bytes`, int64 [V]: bytes of each token, where places are to be compared with another tokenizer's."""
        self.model, self.processor, self.token_bytes = model, processor, token_bytes

    def row(self, sample: Sample, picture: int | None = None, first: int | None = None) -> Row:
        """The row of a sample. A text that stands alone is scored from place `first` on, or from its second token."""
        tail = self.processor.text_ids(sample.text)
        if sample.picture is None:
            places = self._places(tail)
            least = places[1] if first is None else first
            scored = [index for index in range(1, len(tail)) if places[index] >= least]
            return Row(tail, scored, [places[index] for index in scored], None)
        head = self.processor.prompt_ids(self.processor.config.prompt.caption_prompt, 1)
        ids = [*head, *tail, self.processor.eos_id]
        scored = list(range(len(head), len(ids)))
        return Row(ids, scored, self._places([*tail, self.processor.eos_id]), picture)

    def _places(self, tokens: Sequence[int]) -> list[int]:
        sizes = [1] * len(tokens) if self.token_bytes is None else self.token_bytes[list(tokens)].tolist()
        return [0, *np.cumsum(sizes[:-1]).tolist()] if tokens else []

    @torch.no_grad()
    def logits(self, rows: Sequence[Row], features: Tensor | None) -> Tensor:
        """Logits [n, V] at the scored tokens of all rows, in order. `features` [pictures, k, H]."""
        length = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), length), self.processor.pad_id)
        mask, marked = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
            mask[number, : len(row.ids)] = 1
            marked[number, torch.tensor(row.scored) - 1] = True
        embeds = self.model.embed(ids)
        pictures = [row.picture for row in rows if row.picture is not None]
        if pictures and features is not None:
            is_image = (ids == self.processor.image_id).unsqueeze(-1).expand_as(embeds)
            embeds = embeds.masked_scatter(is_image, features[pictures].to(embeds.dtype))
        result: Tensor = self.model(embeds, mask, None, None, marked)
        return result


@torch.no_grad()
def picture_features(model: MicroVLM, processor: Processor, samples: Sequence[Sample]) -> Tensor | None:
    """Prefix embeddings [pictures, k, H] of the samples that have a picture; None where none has."""
    paths = [sample.picture for sample in samples if sample.picture is not None]
    parts = [
        model.encode_image(torch.from_numpy(np.stack([processor.pixels(path) for path in part])))
        for part in batches(paths)
    ]
    return torch.cat(parts) if parts else None


def batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Parts of BATCH items each."""
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]
