"""Stage `photo`: the adapter and the decoder learn to answer questions about encoded pictures.

The encoder is frozen and its feature maps are stored, so that a step costs no convolution. The prefix embeddings of a
picture go through the decoder once, and its questions go on from there.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.model.microvlm import MicroVLM
from microvlm.training.batches.sample_texts import IGNORED
from microvlm.training.photo.batches.picture_questions import Questioner
from microvlm.training.photo.batches.question_batches import (
    VIRTUAL_SHARE,
    QuestionBatch,
    QuestionRows,
    QuestionSampler,
    question_rows,
)
from microvlm.training.photo.stages.photo_task import TRAINED, PhotoTask, prefixes_of
from microvlm.training.stages.task import StageInputs

QUESTIONS = 5
"""Questions about each picture of a batch."""
EVALUATED = 1024
"""Pictures of the calibration split that are evaluated, with a question each."""


class AnswerTask(PhotoTask):
    """Cross-entropy of answers with the memory masked."""

    virtual_share = VIRTUAL_SHARE
    """Share of made pictures in a batch."""

    def __init__(self, inputs: StageInputs):
        super().__init__(inputs)
        self._sampler: QuestionSampler | None = None
        self._held_out: list[tuple[int, str, str, str]] = []

    def trained_parts(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in TRAINED]

    def prepare(self) -> None:
        super().prepare()
        rng = np.random.default_rng(self.recipe.seed)
        virtual = self.virtual_pictures(rng)
        self._sampler = QuestionSampler(
            self.data, self.rows, virtual, self.config.prefix_tokens, self.virtual_share
        )
        questioner = Questioner(self.data.names, "held_out")
        for row, description in enumerate(self.data.descriptions("calibration")[:EVALUATED]):
            asked = questioner.ask(description, rng)
            self._held_out.append(
                (row, asked.kind if description.things else description.kind, asked.question, asked.answer)
            )

    def draw(self, generator: torch.Generator) -> QuestionBatch:
        assert self._sampler is not None, "prepare() comes first"
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        return self._sampler.draw(rng, self.stage.batch_size, QUESTIONS)

    def size(self, batch: QuestionBatch) -> tuple[int, int]:
        return len(batch.features), int(batch.rows.mask.sum())

    def loss(self, module: MicroVLM, batch: QuestionBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logits, labels, _ = answer_logits(
            module, batch.features, batch.rows, batch.is_told, self.name_table()
        )
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.stage.label_smoothing)
        return loss, {"accuracy": (logits.argmax(-1) == labels).float().mean()}

    def evaluate(self, run: Path, step: int) -> dict[str, float]:
        """Answers about calibration pictures in held-out wordings that teacher forcing gives exactly, by kind."""
        self.store_names()
        right: dict[str, list[bool]] = defaultdict(list)
        losses = []
        for start in range(0, len(self._held_out), 64):
            part = self._held_out[start : start + 64]
            features = torch.from_numpy(
                self.data.features("calibration", np.array([row for row, *_ in part]))
            )
            numbered = [(i, question, answer) for i, (_, _, question, answer) in enumerate(part)]
            rows = question_rows(self.rows, numbered, self.config.prefix_tokens)
            logits, labels, row = answer_logits(self.model, features, rows)
            losses.append(float(F.cross_entropy(logits.float(), labels)))
            wrong = torch.zeros(len(part), device=row.device).index_add(
                0, row, (logits.argmax(-1) != labels).float()
            )
            for (_, kind, _, _), mistakes in zip(part, wrong.tolist(), strict=True):
                right[kind].append(mistakes == 0)
        scores = {f"evaluation/{kind}": float(np.mean(values)) for kind, values in sorted(right.items())}
        everything = [value for values in right.values() for value in values]
        return {
            **scores,
            "evaluation/exact": float(np.mean(everything)),
            "evaluation/loss": float(np.mean(losses)),
        }


def answer_logits(
    model: MicroVLM,
    features: Tensor,
    rows: QuestionRows,
    is_told: Tensor | None = None,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] at the labelled positions, their labels [N] and rows [N], with the memory slot masked."""
    device = model.memory_prior.device
    prefix = prefixes_of(model, features, is_told, table)
    pictures, k = prefix.shape[:2]
    ids, mask, labels, owner = (part.to(device) for part in rows)
    slot = model.empty_slot(pictures)
    seen = torch.ones(pictures, 1 + k, dtype=torch.long, device=device)
    seen[:, 0] = 0
    places = torch.arange(1, k + 1, device=device).expand(pictures, -1)
    _, past = model.decoder(prefix, seen, places, slot)
    hidden, targets, owners = [], [], []
    # In two parts, short rows and long ones, so that less of the work is on padding.
    lengths = mask.sum(1)
    order = lengths.argsort(stable=True)
    for part in order.tensor_split(2):
        length = int(lengths[part].max())
        of = owner[part]
        cache = [(key[of], value[of]) for key, value in past]
        positions = torch.arange(k + 1, k + 1 + length, device=device).expand(len(part), -1)
        visible = torch.cat([seen[of], mask[part, :length]], 1)
        states, _ = model.decoder(model.embed(ids[part, :length]), visible, positions, cache)
        labelled = labels[part, :length] != IGNORED
        hidden.append(states[labelled])
        targets.append(labels[part, :length][labelled])
        owners.append(part[:, None].expand(-1, length)[labelled])
    return model.embedding.head(torch.cat(hidden)), torch.cat(targets), torch.cat(owners)
