"""Stage `photo-names`: the decoder learns to say the name of what the encoder's classifier tells.

A batch is hundreds of short rows: the first prefix embedding of a picture and those that spell its class, a plain
question, a name. Most names have no photographs, so half of the rows are of features moved along the classifier's
directions (`virtual_pictures`). A step has several times as many names as one among long questions of all kinds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.model.microvlm import MicroVLM
from microvlm.training.batches.sample_texts import IGNORED
from microvlm.training.photo.batches.class_targets import ALONE
from microvlm.training.photo.batches.name_batches import (
    PLAIN_QUESTIONS,
    NameBatch,
    NameSampler,
    plain_batch,
    quarters,
)
from microvlm.training.photo.batches.question_batches import question_rows
from microvlm.training.photo.language import answers
from microvlm.training.photo.stages.photo_task import TRAINED, PhotoTask, encoder_of, hide_features
from microvlm.training.stages.task import StageInputs

EVALUATED = 512
"""Calibration pictures of one thing that are evaluated."""


class NameTask(PhotoTask):
    """Cross-entropy of names behind the first prefix embedding and the spelled name, with the memory masked."""

    def __init__(self, inputs: StageInputs):
        super().__init__(inputs)
        self._sampler: NameSampler | None = None
        self._held_out: list[tuple[int, str]] = []

    def trained_parts(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in TRAINED]

    def prepare(self) -> None:
        super().prepare()
        virtual = self.virtual_pictures(np.random.default_rng(self.recipe.seed))
        self._sampler = NameSampler(
            self.data, self.rows, virtual, self.config.prefix_tokens, bool(self.config.vision.name_pieces)
        )
        for row, d in enumerate(self.data.descriptions("calibration")):
            if d.kind in ALONE and len(self._held_out) < EVALUATED:
                self._held_out.append((row, d.things[0].name or answers.UNKNOWN_THING))

    def draw(self, generator: torch.Generator) -> NameBatch:
        assert self._sampler is not None, "prepare() comes first"
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        return self._sampler.draw(rng, self.stage.batch_size)

    def size(self, batch: NameBatch) -> tuple[int, int]:
        return len(batch.quarters), int(batch.rows.mask.sum())

    def loss(self, module: MicroVLM, batch: NameBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logits, labels, _ = name_logits(module, batch, self.name_table())
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.stage.label_smoothing)
        return loss, {"accuracy": (logits.argmax(-1) == labels).float().mean()}

    def evaluate(self, run: Path, step: int) -> dict[str, float]:
        """The share of calibration pictures of one thing whose name teacher forcing gives exactly."""
        self.store_names()
        right, losses = [], []
        for start in range(0, len(self._held_out), 128):
            part = self._held_out[start : start + 128]
            maps = quarters(self.data, "calibration", np.array([row for row, _ in part]))
            asked = [(number, PLAIN_QUESTIONS[0], name) for number, (_, name) in enumerate(part)]
            rows = question_rows(self.rows, asked, self.config.prefix_tokens)
            logits, labels, owner = name_logits(self.model, plain_batch(maps, rows))
            losses.append(F.cross_entropy(logits.float(), labels))
            wrong = torch.zeros(len(part), device=owner.device)
            right.append(wrong.index_add(0, owner, (logits.argmax(-1) != labels).float()) == 0)
        return {
            "evaluation/names": float(torch.cat(right).float().mean()),
            "evaluation/loss": float(torch.stack(losses).mean()),
        }


def name_logits(
    model: MicroVLM, batch: NameBatch, table: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] at the labelled positions, their labels [N] and rows [N]. The first prefix embedding and those that
    spell the name are all that is seen of a picture, at their usual positions."""
    device = model.memory_prior.device
    encoder = encoder_of(model)
    with torch.no_grad():
        token = encoder.whole_token(batch.quarters.to(device))
        token = hide_features(token, batch.is_told.to(device), encoder.config.features_of_token)
    prefix = model.adapter(token, table)
    is_borrowed = batch.borrowed[:, 0].to(device) >= 0
    if table is not None and is_borrowed.any():
        first, second = batch.borrowed.to(device)[is_borrowed].unbind(1)
        share = batch.faint.to(device)[is_borrowed][:, None, None]
        spelled = prefix.clone()
        spelled[is_borrowed, 1:] = (1 - share) * table[first] + share * table[second]
        prefix = spelled
    ids, mask, labels, _ = (part.to(device) for part in batch.rows)
    k, tokens = model.config.prefix_tokens, model.config.vision.num_tokens
    embeds = torch.cat([prefix, model.embed(ids)], 1)
    shown = torch.ones(len(ids), prefix.shape[1], dtype=torch.long, device=device)
    visible = torch.cat([torch.zeros_like(shown[:, :1]), shown, mask], 1)
    places = [1, *range(tokens + 1, k + 1), *range(k + 1, k + 1 + ids.shape[1])]
    positions = torch.tensor(places, device=device).expand(len(ids), -1)
    states, _ = model.decoder(embeds, visible, positions, model.empty_slot(len(ids)))
    labelled = labels != IGNORED
    owner = torch.arange(len(ids), device=device)[:, None].expand(-1, ids.shape[1])[labelled]
    return model.embedding.head(states[:, prefix.shape[1] :][labelled]), labels[labelled], owner
