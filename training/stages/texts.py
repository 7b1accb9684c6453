"""Stage `texts`: trains a model's decoder on plain text, with the model that it starts from as teacher or without.

With a teacher and `decoder_bits` 1.58 it distils a float decoder into a ternary one where there are no pictures; texts
that `microvlm-data sampled` drew from the teacher need no text either.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.errors import UserError
from microvlm.inputs.text_data import TextData, open_texts
from microvlm.model.microvlm import MicroVLM
from microvlm.training.batches.conversation_rows import Rows
from microvlm.training.batches.sample_texts import IGNORED
from microvlm.training.batches.token_rows import TokenRows, row_states
from microvlm.training.losses.chunked_loss import CHUNK_ROWS, chunked_loss
from microvlm.training.losses.distillation_loss import logits_divergence
from microvlm.training.parameter_selection import relative_rates
from microvlm.training.recipe import StageConfig
from microvlm.training.stages.distillation import Teacher
from microvlm.training.stages.task import DataFolder, StageInputs, WholeModelTask
from microvlm.training.stages.teacher_outputs import bytes_per_token
from microvlm.training.watching import names

EVALUATED, BATCH = 256, 16
"""Held-out texts that are evaluated, evenly spread, and rows of a batch."""


class TextTask(WholeModelTask):
    """Cross-entropy of next tokens, and the losses of distillation. `trained` and `teacher` are those of `caption`."""

    keeps_frozen_parts_out = True

    def __init__(self, inputs: StageInputs):
        super().__init__(inputs)
        self.module = self.model
        self.data: list[TextData] = inputs.data
        self.texts = [text for data in self.data for text in data.train]
        self.token_rows = TokenRows(self.rows.processor)
        self.rates = relative_rates(
            (name for name, _ in self.model.named_parameters()), self.stage.caption.trained
        )
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.rates.get(name, 0.0) > 0)
        self.teacher = Teacher(self.stage.caption.teacher, inputs) if self.stage.caption.teacher else None
        held_out = [text for data in self.data for text in data.validation]
        chosen = np.unique(
            np.linspace(0, len(held_out) - 1, min(EVALUATED, len(held_out))).round().astype(int)
        )
        self.held_out = [held_out[index] for index in chosen]

    @classmethod
    def check(cls, stage: StageConfig) -> None:
        super().check(stage)
        trained = [name for name, rate in stage.caption.trained.items() if rate > 0]
        if not any(name == "all" or name.split(".")[0] in ("decoder", "embedding") for name in trained):
            raise UserError(
                f"stage '{stage.name}' trains on text alone, which only the decoder and the embedding see: name "
                "'decoder' in its `trained`."
            )

    @classmethod
    def open_data(cls, folders: Sequence[DataFolder]) -> list[TextData]:
        weighted = [path for path, weight in folders if weight != 1]
        if weighted:
            raise UserError(
                f"{weighted[0]} has a weight: texts are mixed by their number; leave the weight out."
            )
        return [open_texts(path) for path, _ in folders]

    @classmethod
    def tokenizer_texts(cls, data: list[TextData]) -> Iterable[str]:
        for source in data:
            yield from source.train

    @classmethod
    def epoch_samples(cls, data: list[TextData]) -> int:
        return sum(len(source.train) for source in data)

    @classmethod
    def describe_data(cls, data: list[TextData]) -> list[dict[str, Any]]:
        return [
            {"name": source.path.name, "samples": len(source.train), "sha256": source.sha256}
            for source in data
        ]

    def parameter_groups(self) -> list[dict]:
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(self.rates[name], []).append(parameter)
        base = self.stage.learning_rate
        return [{"params": groups[rate], "lr": rate * base} for rate in sorted(groups, reverse=True)]

    def prepare(self) -> None:
        """Ask the teacher once about every text, if the run sees each at least twice and the outputs fit."""
        teacher = self.teacher
        if teacher is None or self.stage.steps * self.stage.batch_size < 2 * len(self.texts):
            return
        device = self.model.memory_prior.device
        precision = torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32
        tokens = sum(len(self.token_rows.tokens(text)) for text in self.texts)
        text = self.config.text
        heads = text.num_attention_heads * text.head_dim + 2 * text.kv_width
        if tokens * bytes_per_token(text.hidden_size, heads, precision) > teacher.options.kept_gb * 1e9:
            return
        teacher.keep(self.texts, lambda texts: self.token_rows.build(texts).to(device), precision)

    def draw(self, generator: torch.Generator) -> Rows:
        return self.draw_step(0, generator)

    def draw_step(self, step: int, generator: torch.Generator) -> Rows:
        """Texts in an order of their own in every epoch and stage."""
        size, count = self.stage.batch_size, len(self.texts)
        positions = np.arange(step * size, (step + 1) * size)
        # A second stage has orders of its own: it would begin with the texts that the first one began with.
        place = [stage.name for stage in self.recipe.stages].index(self.stage.name)
        orders = {
            int(epoch): np.random.default_rng(self._order(place, int(epoch))).permutation(count)
            for epoch in np.unique(positions // count)
        }
        return self.token_rows.build(
            [self.texts[orders[int(place) // count][int(place) % count]] for place in positions]
        )

    def size(self, batch: Rows) -> tuple[int, int]:
        return len(batch.ids), int((batch.labels != IGNORED).sum())

    def _order(self, place: int, epoch: int) -> np.random.SeedSequence:
        """The seed of an epoch's order in the recipe's stage number `place`. The first one's is that of older runs."""
        if place == 0:
            return np.random.SeedSequence((self.recipe.seed, epoch))
        return np.random.SeedSequence(self.recipe.seed, spawn_key=(place, epoch))

    def loss(self, module: MicroVLM, batch: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        rows = batch.to(module.memory_prior.device)
        labels = rows.labels[rows.labels != IGNORED]
        head, teacher = module.embedding, self.teacher
        target = relation = None
        if teacher is None:
            states = row_states(module, rows)
        else:
            states, target, relation = teacher.compare_texts(module, rows)

        def of_chunk(part: Tensor, chunk: slice) -> Tensor:
            logits = head.head(part).float()
            smoothing = self.stage.label_smoothing
            terms = [F.cross_entropy(logits, labels[chunk], reduction="sum", label_smoothing=smoothing)]
            if teacher is not None and target is not None:
                divergence = logits_divergence(
                    logits, teacher.head(target[chunk]), teacher.options.temperature
                )
                terms.append(teacher.options.logits_weight * divergence * len(logits))
            return torch.stack(terms) / len(labels)

        loss, terms = chunked_loss(states, of_chunk, list(head.parameters()))
        metrics = {names.LM_LOSS: terms[0]}
        if teacher is not None and relation is not None:
            metrics[names.DISTILLATION_KL] = terms[1] / max(teacher.options.logits_weight, 1e-30)
            metrics[names.RELATION_LOSS] = relation
            loss = loss + teacher.options.relation_weight * relation
        return loss, metrics

    def evaluate(self, run: Path, step: int) -> dict[str, float]:
        """Held-out texts: cross-entropy, and with a teacher the KL divergence from it, in nats a token."""
        totals = {"nats": 0.0, "tokens": 0.0, "kl": 0.0, "same": 0.0}
        device = self.model.memory_prior.device
        for start in range(0, len(self.held_out), BATCH):
            rows = self.token_rows.build(self.held_out[start : start + BATCH]).to(device)
            labels = rows.labels[rows.labels != IGNORED]
            states = row_states(self.model, rows)
            theirs = None if self.teacher is None else self.teacher.states(rows)
            totals["tokens"] += len(labels)
            # Logits of all rows over the whole vocabulary would take gigabytes.
            for first in range(0, len(labels), CHUNK_ROWS):
                chunk = slice(first, first + CHUNK_ROWS)
                logits = self.model.embedding.head(states[chunk]).float()
                totals["nats"] += float(F.cross_entropy(logits, labels[chunk], reduction="sum"))
                if self.teacher is not None and theirs is not None:
                    target = self.teacher.head(theirs[chunk]).float()
                    both = logits.log_softmax(-1), target.log_softmax(-1)
                    totals["kl"] += float(F.kl_div(*both, reduction="sum", log_target=True))
                    totals["same"] += float((logits.argmax(-1) == target.argmax(-1)).sum())
        tokens = max(1.0, totals["tokens"])
        values = {names.EVALUATION_TEXT_LOSS: totals["nats"] / tokens}
        if self.teacher is None:
            return {names.EVALUATION_LOSS: values[names.EVALUATION_TEXT_LOSS], **values}
        kl = totals["kl"] / tokens
        return {
            names.EVALUATION_LOSS: kl,
            names.EVALUATION_KL: kl,
            "evaluation/top1": totals["same"] / tokens,
            **values,
        }
