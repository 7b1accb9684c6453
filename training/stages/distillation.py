"""The teacher of a stage: the model that the stage starts from, in float, and how a student is compared with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from microvlm.errors import UserError
from microvlm.model.checkpoint import load_checkpoint
from microvlm.model.decoder import Cache
from microvlm.model.microvlm import MicroVLM
from microvlm.model.vision import normalise
from microvlm.training.batches.batch_share import BatchShare
from microvlm.training.batches.caption_batches import CaptionBatch
from microvlm.training.batches.conversation_rows import Rows
from microvlm.training.batches.token_rows import row_logits, row_states
from microvlm.training.caption_options import TeacherOptions
from microvlm.training.losses.distillation_loss import logits_divergence, recorded_heads, relation_divergence
from microvlm.training.stages.picture_encoding import vision_features
from microvlm.training.stages.task import StageInputs
from microvlm.training.watching import names


class Teacher:
    """A frozen float model. Rows are compared with the memory slot masked."""

    def __init__(self, options: TeacherOptions, inputs: StageInputs):
        if inputs.start is None:
            raise UserError(
                f"stage '{inputs.stage.name}' has a teacher, which is the model that a run starts from: give --start."
            )
        self.options, self.config = options, inputs.config
        self.model = load_checkpoint(inputs.start).requires_grad_(False)
        if self.model.config.quantization.is_ternary:
            raise UserError(
                f"stage '{inputs.stage.name}' has a teacher, and {inputs.start} is ternary: give --start a float model."
            )
        self.image_id = inputs.rows.processor.image_id
        depth = self.config.text.num_hidden_layers
        self.layer = min(depth - 1, round(options.relation_depth * depth))

    def compare(
        self,
        student: MicroVLM,
        batch: CaptionBatch,
        rows: Rows,
        embeds: Tensor,
        slot: Cache | None,
        visible: Tensor | None,
        labelled: Tensor,
    ) -> tuple[Tensor, dict[str, tuple[float, Tensor]]]:
        """The student's logits at the labelled positions [n, V], and the losses of distillation with their weights.

        The losses are this process's parts of those of the whole batch.
        """
        images = int((rows.ids == self.image_id).sum()) // self.config.prefix_tokens

        def shown(teacher: MicroVLM) -> Tensor:
            scaled = batch.pixels[:images].to(embeds.device).float() / 255
            prefixes = teacher.adapter(vision_features(teacher, normalise(scaled, self.config.vision)))
            return teacher.place_images(rows.ids, self.image_id, prefixes)

        # Rows that see a memory of strange pictures must answer as without: the teacher's target is the same.
        return self._compare(
            student,
            lambda: student(embeds, rows.mask, slot, visible, labelled),
            shown,
            rows,
            labelled,
            batch.share,
        )

    def compare_texts(self, student: MicroVLM, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """The states of student and teacher [n, H] at the labelled positions of plain text, and the relations' loss.

        Their output heads are the caller's: over a large vocabulary they are applied to some rows at a time.
        """
        with recorded_heads(student.decoder, self.layer) as own:
            states = row_states(student, rows)
        teacher = self._on(rows.ids.device)
        with torch.no_grad(), recorded_heads(teacher.decoder, self.layer) as theirs:
            target = row_states(teacher, rows)
        return states, target, relation_divergence(own[0], theirs[0], rows.mask, self.options.relation_heads)

    def head(self, states: Tensor) -> Tensor:
        """The teacher's logits [n, V] of its hidden states [n, H], without gradient."""
        with torch.no_grad():
            return self._on(states.device).embedding.head(states)

    def logits(self, rows: Rows) -> Tensor:
        """The teacher's logits [n, V] at the labelled positions of rows of plain text."""
        with torch.no_grad():
            return row_logits(self._on(rows.ids.device), rows)

    def _compare(
        self,
        student: MicroVLM,
        student_logits: Callable[[], Tensor],
        embed: Callable[[MicroVLM], Tensor],
        rows: Rows,
        labelled: Tensor,
        share: BatchShare,
    ) -> tuple[Tensor, dict[str, tuple[float, Tensor]]]:
        """`embed` gives the embeddings [B, S, H] of the rows as a model has them."""
        options = self.options
        teacher = self._on(rows.ids.device)
        with recorded_heads(student.decoder, self.layer) as own:
            logits = student_logits()
        with torch.no_grad(), recorded_heads(teacher.decoder, self.layer) as theirs:
            target = teacher(embed(teacher), rows.mask, None, None, labelled)
        divergence = logits_divergence(logits, target, options.temperature)
        relation = relation_divergence(own[0], theirs[0], rows.mask, options.relation_heads)
        divergence = share.part(divergence, len(logits), share.row_tokens)
        relation = share.part(relation, int(rows.mask.sum()), share.row_positions)
        return logits, {
            names.DISTILLATION_KL: (options.logits_weight, divergence),
            names.RELATION_LOSS: (options.relation_weight, relation),
        }

    def _on(self, device: torch.device) -> MicroVLM:
        if self.model.memory_prior.device != device:
            self.model = self.model.to(device)
        return self.model
