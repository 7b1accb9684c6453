"""Stage `photo-memory`: the memory encoder, W_M and the scope detector learn facts with open values.

The vision encoder, adapter, embedding and decoder are frozen, so that pictures are answered as before. Losses:

- keys: InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) makes keys of another view and another wording of one query
  equal, and those of other queries, strangers' among them, different;
- readings: what a query reads must point at the latent of its own fact among all of the memory, by InfoNCE;
- outside of the key space: the same for the part of latents that the scope detector compares, and for questions with
  those of the facts, whose agreement is evidence of what a reading points at;
- apart: cosines of a query with its own fact above one margin, with all others below it, in keys and outside of them
  (pairwise sigmoids, Zhai et al. 2023, arXiv 2303.15343): one threshold serves all memories, and InfoNCE knows none;
- parts: the first and the fourth for the pictures alone and the words alone, whose keys are evidence too;
- spread: the frame potential of the keys (Benedetto and Fickus 2003);
- scope: cross-entropy of written facts against strangers;
- decoder: cross-entropy of the value, said from the reading alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.errors import UserError
from microvlm.model.memory_algebra import MemoryState, batch_solution
from microvlm.model.microvlm import MicroVLM
from microvlm.training.batches.sample_texts import IGNORED
from microvlm.training.losses.loss_terms import TEMPERATURE, binary_loss, frame_potential
from microvlm.training.photo.batches.memory_batches import MemoryBatch, MemorySampler, Rows
from microvlm.training.photo.stages.photo_task import PhotoTask, prefixes_of
from microvlm.training.recipe import StageConfig
from microvlm.training.stages.task import StageInputs

SIZES = (64, 32, 16, 8)
"""Facts of a memory; a batch has as many in all as `batch_size` says, and as many strangers."""
KEY_WEIGHT, READ_WEIGHT, OUTSIDE_WEIGHT, SPREAD_WEIGHT, SAID_WEIGHT, APART_WEIGHT = (
    1.0,
    1.0,
    0.25,
    2.0,
    0.1,
    0.5,
)
PICTURES_WEIGHT, WORDS_WEIGHT = 0.5, 1.0
MARGIN, STEEPNESS = 0.6, 12.0
"""The cosine that tells a query of a fact from others, and how sharply."""
EVALUATED = 8
"""Batches of the evaluation."""


class MemoryTask(PhotoTask):
    """The losses of this stage."""

    def __init__(self, inputs: StageInputs):
        super().__init__(inputs)
        self.sizes = [size for size in SIZES if self.stage.batch_size % size == 0]
        shown = (self.data, self.rows, self.config)
        self.sampler = MemorySampler(*shown, "views", "train", True)
        self.held_out = MemorySampler(*shown, "calibration_views", "held_out", False)

    @classmethod
    def check(cls, stage: StageConfig) -> None:
        super().check(stage)
        if stage.batch_size % min(SIZES):
            raise UserError(
                f"stage '{stage.name}': batch_size counts facts, in memories of {min(SIZES)} and more, and "
                f"{stage.batch_size} is no multiple of {min(SIZES)}: give {max(SIZES)}."
            )

    def trained_parts(self) -> list[nn.Module]:
        return [self.model.memory_encoder, self.model.memory_projection, self.model.scope]

    def draw(self, generator: torch.Generator) -> MemoryBatch:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        return self.sampler.draw(rng, self.stage.batch_size, self.sizes[int(rng.integers(len(self.sizes)))])

    def size(self, batch: MemoryBatch) -> tuple[int, int]:
        return self.stage.batch_size, int(
            sum(
                rows.mask.sum()
                for rows in (batch.written, batch.full, batch.asked, *batch.pictures, *batch.words)
            )
        )

    def loss(self, module: MicroVLM, batch: MemoryBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return memory_losses(module, batch, self.rows.processor.image_id, self.rows.processor.eos_id)

    def evaluate(self, run: Path, step: int) -> dict[str, float]:
        """Facts of other pictures, with held-out wordings and values: the share of readings that point at their own
        fact, and the scope detector's accuracy."""
        sums: dict[str, list[float]] = {}
        for number in range(EVALUATED):
            rng = np.random.default_rng(number)
            batch = self.held_out.draw(rng, self.stage.batch_size, self.sizes[number % len(self.sizes)])
            loss, metrics = self.loss(self.model, batch)
            for name, value in {"loss": loss, **metrics}.items():
                sums.setdefault(f"evaluation/{name}", []).append(float(value))
        return {name: float(np.mean(values)) for name, values in sums.items()}


def memory_losses(
    model: MicroVLM, batch: MemoryBatch, image_id: int, eos_id: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses, and each of them with shares of readings that point at their own fact."""
    device = model.memory_prior.device
    features = batch.features.to(device) * batch.factors.to(device)[..., None, None]
    prefixes = prefixes_of(model, features).detach()

    def encode(rows: Rows) -> tuple[Tensor, Tensor]:
        latent, key = model.memory_encode(_embedded(model, rows, prefixes, image_id), rows.mask.to(device))
        return latent, key

    (cues, keys), (latents, latent_keys), (queries, query_keys) = map(
        encode, (batch.written, batch.full, batch.asked)
    )
    count, groups = len(keys), len(keys) // batch.size
    asked_keys, stranger_keys = query_keys[:count], query_keys[count:]
    loss_keys, apart_keys = _key_losses(keys, asked_keys, stranger_keys, batch)
    loss_cues, apart_cues = _key_losses(
        _outside(model, cues, keys),
        _outside(model, queries[:count], asked_keys),
        _outside(model, queries[count:], stranger_keys),
        batch,
    )
    first, again = (encode(rows)[1] for rows in batch.words)
    loss_words = _part_losses(first, again, batch.meanings.to(device))
    loss_pictures = torch.zeros(()).to(keys)
    # The memories of a batch may all be about words.
    if len(batch.pictures[0].ids) > 1:
        first, again = (encode(rows)[1] for rows in batch.pictures)
        loss_pictures = _part_losses(first, again, torch.arange(len(first), device=device))
    stored_keys, stored = keys.unflatten(0, (groups, -1)), latents.unflatten(0, (groups, -1))
    variance = model.config.memory.observation_variance
    state = batch_solution(model.memory_reset().mean[0], stored_keys, stored, variance)
    readings = asked_keys.unflatten(0, (groups, -1)) @ state.mean
    cosines = F.normalize(readings, dim=-1) @ stored.mT
    own = torch.arange(batch.size, device=device).expand(groups, -1)
    loss_read = F.cross_entropy((cosines / TEMPERATURE).flatten(0, 1), own.flatten())
    loss_outside = _nce(
        _outside(model, queries[:count], asked_keys) @ _outside(model, latents, latent_keys).T
    )
    spread = frame_potential(keys)
    in_scope, slot = _read(model, state, asked_keys, queries[:count], groups)
    out_of_scope, _ = _read(model, state, stranger_keys, queries[count:], groups)
    scope = 0.5 * (binary_loss(in_scope, 1) + binary_loss(out_of_scope, 0))
    said, exact = _said(model, batch, slot, prefixes, image_id, eos_id)
    loss = (
        KEY_WEIGHT * loss_keys + READ_WEIGHT * loss_read + OUTSIDE_WEIGHT * (loss_outside + loss_cues)
        + APART_WEIGHT * (apart_keys + apart_cues) + PICTURES_WEIGHT * loss_pictures + WORDS_WEIGHT * loss_words
        + SPREAD_WEIGHT * spread + scope + SAID_WEIGHT * said
    )  # fmt: skip
    return loss, {
        "keys": loss_keys,
        "read": loss_read,
        "outside": loss_outside,
        "cues": loss_cues,
        "apart_keys": apart_keys,
        "apart_cues": apart_cues,
        "pictures": loss_pictures,
        "words": loss_words,
        "spread": spread,
        "scope": scope,
        "said": said,
        "said_tokens": exact,
        "pointing": (cosines.argmax(-1) == own).float().mean(),
        "let_in": (out_of_scope > 0.5).float().mean(),
        "kept_out": (in_scope <= 0.5).float().mean(),
    }


def _key_losses(keys: Tensor, asked: Tensor, strangers: Tensor, batch: MemoryBatch) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE of written and asked keys, and the loss of cosines on the wrong side of the margin.

    Strangers are further candidates for each written key. Facts of other memories of the batch may ask the same: they
    are candidates only inside of a memory.
    """
    written, asked, others = (F.normalize(rows, dim=-1) for rows in (keys, asked, strangers))
    group = torch.arange(len(keys), device=keys.device) // batch.size
    other_group = torch.arange(len(strangers), device=keys.device) // (
        len(strangers) // (len(keys) // batch.size)
    )
    apart = group[:, None] != group
    cosines = (written @ asked.T).masked_fill(apart, float("-inf"))
    strange = (written @ others.T).masked_fill(group[:, None] != other_group, float("-inf"))
    target = torch.arange(len(keys), device=keys.device)
    forth = F.cross_entropy(torch.cat([cosines, strange], 1) / TEMPERATURE, target)
    contrast = 0.5 * (forth + F.cross_entropy(cosines.T / TEMPERATURE, target))
    own = cosines.diagonal()
    wrong = cosines.masked_fill(torch.eye(len(keys), dtype=torch.bool, device=keys.device), -1.0).amax(0)
    margins = (MARGIN - own, wrong - MARGIN, strange.amax(0) - MARGIN)
    return contrast, sum(
        (F.softplus(STEEPNESS * margin).mean() for margin in margins), torch.zeros(()).to(own)
    )


def _part_losses(first: Tensor, again: Tensor, meanings: Tensor) -> Tensor:
    """InfoNCE and the loss of the margin for the keys [n, K] of parts, each encoded twice.

    meanings : int64 [n]; parts with equal ones are no candidates for each other.
    """
    cosines = F.normalize(first, dim=-1) @ F.normalize(again, dim=-1).T
    is_own = torch.eye(len(first), dtype=torch.bool, device=first.device)
    alike = (meanings[:, None] == meanings) & ~is_own
    wrong = cosines.masked_fill(is_own | alike, -1.0).amax(0)
    margins = torch.stack([MARGIN - cosines.diagonal(), wrong - MARGIN])
    contrast = _nce(cosines.masked_fill(alike, float("-inf")))
    return contrast + APART_WEIGHT * F.softplus(STEEPNESS * margins).mean(1).sum()


def _outside(model: MicroVLM, latents: Tensor, keys: Tensor) -> Tensor:
    """The directions of the parts of latents that their keys do not determine, [n, C]."""
    return F.normalize(latents - keys @ model.memory_encoder.pseudo_inverse.T, dim=-1)


def _nce(scores: Tensor) -> Tensor:
    target = torch.arange(len(scores), device=scores.device)
    scores = scores / TEMPERATURE
    return 0.5 * (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target))


def _read(
    model: MicroVLM, state: MemoryState, keys: Tensor, latents: Tensor, groups: int
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Scope [n] and memory slot of queries, the first ones of the first memory."""
    memory = torch.arange(len(keys), device=keys.device) // (len(keys) // groups)
    _, scope, _, slot = model.memory_read(keys, latents, state.mean[memory], state.covariance[memory])
    return scope, slot


def _said(
    model: MicroVLM,
    batch: MemoryBatch,
    slot: list[tuple[Tensor, Tensor]],
    prefixes: Tensor,
    image_id: int,
    eos_id: int,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the first facts' values, said from the reading alone, and the share of right tokens."""
    device = prefixes.device
    count = len(batch.values)
    rows = Rows(*(part[:count] for part in batch.asked))
    # Some of the prefix may be masked; the question's last token never is.
    heads = rows.mask.shape[1] - rows.mask.flip(1).argmax(1)
    values = batch.values
    ids = torch.cat([rows.ids, torch.full_like(values, eos_id)], 1)
    mask = torch.cat([rows.mask, torch.zeros_like(values)], 1)
    labels = torch.full_like(ids, IGNORED)
    for row, head in enumerate(heads.tolist()):
        length = int((values[row] != IGNORED).sum())
        ids[row, head : head + length - 1] = values[row, : length - 1]
        mask[row, head : head + length - 1] = 1
        labels[row, head - 1 : head + length - 1] = values[row, :length]
    embeds = _embedded(model, Rows(ids, mask, rows.pictures), prefixes, image_id)
    slots = [(key[:count], value[:count]) for key, value in slot]
    labels = labels.to(device)
    labelled = labels != IGNORED
    logits = model(embeds, mask.to(device), slots, None, labelled)
    targets = labels[labelled]
    return F.cross_entropy(logits.float(), targets), (logits.argmax(-1) == targets).float().mean()


def _embedded(model: MicroVLM, rows: Rows, prefixes: Tensor, image_id: int) -> Tensor:
    """Embeddings [R, S, H] of rows, with the prefix embeddings of their pictures in place of the image tokens."""
    shown = rows.pictures[rows.pictures >= 0].to(prefixes.device)
    return model.place_images(rows.ids.to(prefixes.device), image_id, prefixes[shown])
