"""Stages `photo-answers-names` and `photo-finish`: names and questions in every step.

Questions of all kinds made the decoder forget how to copy names that it has seen no photographs of. Here each step has
hundreds of names beside them, and more made pictures among them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.model.microvlm import MicroVLM
from microvlm.training.photo.batches.name_batches import NameBatch, NameSampler
from microvlm.training.photo.batches.question_batches import QuestionBatch
from microvlm.training.photo.stages.answer import QUESTIONS, AnswerTask, answer_logits
from microvlm.training.photo.stages.name import name_logits

NAMES = 8
"""Rows of names of a step for each of its pictures."""


class FinishBatch(NamedTuple):
    """A batch of each."""

    questions: QuestionBatch
    names: NameBatch


class AnswerAndNameTask(AnswerTask):
    """Cross-entropy of answers and of names, in equal parts, with the memory masked."""

    virtual_share = 0.4

    def prepare(self) -> None:
        super().prepare()
        assert self._sampler is not None, "made by prepare() of the stage of answers"
        sampler = self._sampler
        self._names = NameSampler(
            self.data, self.rows, sampler.virtual, sampler.prefix_tokens, bool(self.config.vision.name_pieces)
        )

    def draw(self, generator: torch.Generator) -> FinishBatch:  # type: ignore[override]
        assert self._sampler is not None, "prepare() comes first"
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        questions = self._sampler.draw(rng, self.stage.batch_size, QUESTIONS)
        return FinishBatch(questions, self._names.draw(rng, NAMES * self.stage.batch_size))

    def size(self, batch: FinishBatch) -> tuple[int, int]:  # type: ignore[override]
        rows = int(batch.questions.rows.mask.sum()) + int(batch.names.rows.mask.sum())
        return len(batch.questions.features) + len(batch.names.quarters), rows

    def loss(self, module: MicroVLM, batch: FinishBatch) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        losses, accuracies = [], {}
        asked, table = batch.questions, self.name_table()
        for name, (logits, labels, _) in (
            ("answers", answer_logits(module, asked.features, asked.rows, asked.is_told, table)),
            ("names", name_logits(module, batch.names, table)),
        ):
            losses.append(F.cross_entropy(logits.float(), labels, label_smoothing=self.stage.label_smoothing))
            accuracies[name] = (logits.argmax(-1) == labels).float().mean()
        return torch.stack(losses).mean(), accuracies


class FinishTask(AnswerAndNameTask):
    """Trains the decoder alone: all that the memory reads stays as it is."""

    def trained_parts(self) -> list[nn.Module]:
        return [self.model.decoder]
