"""Stage `photo-names`: the decoder learns to say the name of what the encoder's classifier tells.

A batch is hundreds of short rows: the first prefix embedding of a picture and those that spell its class, a plain
question, a name. Most names have no photographs, so half of the rows are of features moved along the classifier's
directions (`virtual_pictures`). A step has several times as many names as one among long questions of all kinds.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.model.microvlm import MicroVLM
from microvlm.training.batches.sample_texts import IGNORED
from microvlm.training.photo.batches.class_targets import ALONE, NAMELESS
from microvlm.training.photo.batches.question_batches import QuestionRows, question_rows
from microvlm.training.photo.batches.virtual_pictures import VirtualPictures
from microvlm.training.photo.data.class_names import class_names
from microvlm.training.photo.language import answers
from microvlm.training.photo.language.question_forms import question
from microvlm.training.photo.stages.photo_task import TRAINED, PhotoTask, encoder_of, hide_features
from microvlm.training.stages.task import StageInputs

VIRTUAL_SHARE, NAMELESS_SHARE = 0.5, 0.08
TOLD_SHARE = 0.5
"""Share of the rows that see class probabilities alone: with features always in view the decoder told made ones from
real ones, and said that it did not know photographs of what has none here."""
PLAIN_QUESTIONS = ("what is this?", "what do you see?", "describe the image")
"""Most rows ask one of these; the others ask in any wording of `what`."""
PLAIN_SHARE = 0.7
EVALUATED = 512


class NameBatch(NamedTuple):
    """Pictures and their names."""

    quarters: Tensor
    """float32 [B, 4, F], mean features of the quarters of each picture, in bytes."""
    rows: QuestionRows
    is_told: Tensor
    """bool [B], whether only class probabilities are seen and the features are hidden."""


class NameTask(PhotoTask):
    """Cross-entropy of names behind the first prefix embedding and the spelled name, with the memory masked."""

    def __init__(self, inputs: StageInputs):
        super().__init__(inputs)
        self._parts = self.data.named_parts
        self._named, self._nameless = np.zeros((0, 2), np.int64), np.zeros((0, 2), np.int64)
        self._virtual: VirtualPictures | None = None
        self._photos = np.zeros(0, np.int64)
        self._classes = class_names()
        self._held_out: list[tuple[int, str]] = []

    def trained_parts(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in TRAINED]

    def prepare(self) -> None:
        places = [
            (part, row, d.kind)
            for part, name in enumerate(self._parts)
            for row, d in enumerate(self.data.descriptions(name))
        ]
        self._named, self._nameless = (
            np.array([(part, row) for part, row, kind in places if kind in kinds], np.int64).reshape(-1, 2)
            for kinds in (ALONE, NAMELESS)
        )
        self._photos = self.data.photographs("train")
        self._virtual = self.virtual_pictures(np.random.default_rng(self.recipe.seed))
        for row, d in enumerate(self.data.descriptions("calibration")):
            if d.kind in ALONE and len(self._held_out) < EVALUATED:
                self._held_out.append((row, d.things[0].name or answers.UNKNOWN_THING))

    def draw(self, generator: torch.Generator) -> NameBatch:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        size = self.stage.batch_size
        virtual = round(size * VIRTUAL_SHARE) if self._virtual is not None else 0
        nameless = round(size * NAMELESS_SHARE) if len(self._nameless) else 0
        chosen = np.concatenate(
            [
                self._named[rng.integers(len(self._named), size=size - virtual - nameless)],
                self._nameless[rng.integers(len(self._nameless), size=nameless)]
                if nameless
                else self._nameless[:0],
            ]
        )
        shown = [self.data.descriptions(self._parts[part])[row] for part, row in chosen]
        names = [d.things[0].name if d.kind in ALONE else None for d in shown]
        quarters = [self._quarters(self._parts[part], np.array([row])) for part, row in chosen]
        if self._virtual is not None and virtual:
            scale = self._virtual.scale
            real = torch.cat([self._quarters("train", rng.choice(self._photos, 1)) for _ in range(virtual)])
            made, told = self._virtual.means(real.mean(1) * scale, rng)
            # The quarters differ as those of a photograph do.
            quarters.append((real + (made / scale - real.mean(1))[:, None]).clamp(0, 255))
            names += [self._classes[number] for number in told.argmax(1).tolist()]
        asked = [
            (number, self._question(rng), answers.UNKNOWN_THING if name is None else name)
            for number, name in enumerate(names)
        ]
        rows = question_rows(self.rows, asked, self.config.prefix_tokens)
        is_told = torch.from_numpy(rng.random(len(names)) < TOLD_SHARE)
        return NameBatch(torch.cat(quarters), rows, is_told)

    def _question(self, rng: np.random.Generator) -> str:
        if rng.random() < PLAIN_SHARE:
            return PLAIN_QUESTIONS[int(rng.integers(len(PLAIN_QUESTIONS)))]
        return question("what", rng)

    def _quarters(self, part: str, rows: np.ndarray) -> Tensor:
        maps = torch.from_numpy(self.data.features(part, rows)).float()
        half = maps.shape[-1] // 2
        return F.avg_pool2d(maps, half).flatten(2).mT

    def size(self, batch: NameBatch) -> tuple[int, int]:
        return len(batch.quarters), int(batch.rows.mask.sum())

    def loss(self, module: MicroVLM, batch: NameBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logits, labels, _ = _name_logits(module, batch, self.name_table())
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.stage.label_smoothing)
        return loss, {"accuracy": (logits.argmax(-1) == labels).float().mean()}

    def evaluate(self, run: Path, step: int) -> dict[str, float]:
        """The share of calibration pictures of one thing whose name teacher forcing gives exactly."""
        self.store_names()
        right, losses = [], []
        for start in range(0, len(self._held_out), 128):
            part = self._held_out[start : start + 128]
            quarters = self._quarters("calibration", np.array([row for row, _ in part]))
            asked = [(number, PLAIN_QUESTIONS[0], name) for number, (_, name) in enumerate(part)]
            rows = question_rows(self.rows, asked, self.config.prefix_tokens)
            logits, labels, owner = _name_logits(
                self.model, NameBatch(quarters, rows, torch.zeros(len(part), dtype=torch.bool))
            )
            losses.append(F.cross_entropy(logits.float(), labels))
            wrong = torch.zeros(len(part), device=owner.device)
            right.append(wrong.index_add(0, owner, (logits.argmax(-1) != labels).float()) == 0)
        return {
            "evaluation/names": float(torch.cat(right).float().mean()),
            "evaluation/loss": float(torch.stack(losses).mean()),
        }


def _name_logits(
    model: MicroVLM, batch: NameBatch, table: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] at the labelled positions, their labels [N] and rows [N]. The first prefix embedding and those that
    spell the name are all that is seen of a picture, at their usual positions."""
    device = model.memory_prior.device
    encoder = encoder_of(model)
    with torch.no_grad():
        token = encoder.whole_token(batch.quarters.to(device) * encoder.head.output_scale)
        token = hide_features(token, batch.is_told.to(device), encoder.config.features_of_token)
    prefix = model.adapter(token, table)
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
