"""The teacher of a stage: the model that the stage starts from, in float, and how a student is compared with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from microvlm.errors import UserError
from microvlm.model.checkpoint import load_checkpoint
from microvlm.model.decoder import Cache
from microvlm.model.microvlm import MicroVLM
from microvlm.model.vision import normalise
from microvlm.training.batches.caption_batches import CaptionBatch
from microvlm.training.batches.conversation_rows import Rows
from microvlm.training.batches.token_rows import row_states
from microvlm.training.caption_options import TeacherOptions
from microvlm.training.losses.distillation_loss import logits_divergence, recorded_heads, relation_divergence
from microvlm.training.stages.picture_encoding import vision_features
from microvlm.training.stages.task import StageInputs
from microvlm.training.stages.teacher_outputs import Outputs, TeacherOutputs
from microvlm.training.watching import names


class Teacher:
    """A frozen float model. Rows are compared with the memory slot masked."""

    def __init__(self, options: TeacherOptions, inputs: StageInputs):
        if inputs.start is None:
            raise UserError(
                f"stage '{inputs.stage.name}' has a teacher, which is the model that a run starts from: give --start."
            )
        self.options, self.config = options, inputs.config
        if (options.device or "cpu") != "cpu" and not torch.cuda.is_available():
            raise UserError(
                f"stage '{inputs.stage.name}' has its teacher on {options.device}, and PyTorch finds no GPU here: "
                "leave `device` out."
            )
        self.model = load_checkpoint(inputs.start).requires_grad_(False)
        if self.model.config.quantization.is_ternary:
            raise UserError(
                f"stage '{inputs.stage.name}' has a teacher, and {inputs.start} is ternary: give --start a float model."
            )
        self.image_id = inputs.rows.processor.image_id
        depth = self.config.text.num_hidden_layers
        self.kept: TeacherOutputs | None = None
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
        options, device = self.options, rows.ids.device
        teacher, own_device = self._on(device), self._device(device)
        with recorded_heads(student.decoder, self.layer) as own:
            logits = student(embeds, rows.mask, slot, visible, labelled)
        with torch.no_grad(), recorded_heads(teacher.decoder, self.layer) as theirs:
            moved = rows.to(own_device)
            scaled = batch.pixels[:images].to(own_device).float() / 255
            prefixes = teacher.adapter(vision_features(teacher, normalise(scaled, self.config.vision)))
            shown = teacher.place_images(moved.ids, self.image_id, prefixes)
            # Rows that see a memory of strange pictures must answer as without: the teacher's target is the same.
            target = teacher(shown, moved.mask, None, None, labelled.to(own_device)).to(device)
        query, key, value = (part.to(device) for part in theirs[0])
        divergence = logits_divergence(logits, target, options.temperature)
        relation = relation_divergence(own[0], (query, key, value), rows.mask, options.relation_heads)
        share = batch.share
        divergence = share.part(divergence, len(logits), share.row_tokens)
        relation = share.part(relation, int(rows.mask.sum()), share.row_positions)
        return logits, {
            names.DISTILLATION_KL: (options.logits_weight, divergence),
            names.RELATION_LOSS: (options.relation_weight, relation),
        }

    def compare_texts(self, student: MicroVLM, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """The states of student and teacher [n, H] at the labelled positions of plain text, and the relations' loss.

        Their output heads are the caller's: over a large vocabulary they are applied to some rows at a time.
        """
        with recorded_heads(student.decoder, self.layer) as own:
            states = row_states(student, rows)
        kept = None if self.kept is None else self.kept.of(rows)
        target, theirs = kept or self._states_and_heads(rows)
        relation = relation_divergence(own[0], theirs, rows.mask, self.options.relation_heads)
        return states, target, relation

    def keep(
        self, texts: Sequence[str], build: Callable[[Sequence[str]], Rows], precision: torch.dtype
    ) -> int:
        """Compute the outputs of all texts now, so that later steps read them; returns their bytes.

        build : the rows of texts, on the student's device.
        """
        self.kept = TeacherOutputs(precision)
        self.kept.fill(texts, build, self._states_and_heads)
        return self.kept.nbytes

    def _states_and_heads(self, rows: Rows) -> Outputs:
        device = rows.ids.device
        teacher = self._on(device)
        with torch.no_grad(), recorded_heads(teacher.decoder, self.layer) as theirs:
            target = row_states(teacher, rows.to(self._device(device)))
        query, key, value = (part.to(device) for part in theirs[0])
        return target.to(device), (query, key, value)

    def head(self, states: Tensor) -> Tensor:
        """The teacher's logits [n, V] of its hidden states [n, H], without gradient."""
        teacher = self._on(states.device)
        with torch.no_grad():
            return teacher.embedding.head(states.to(self._device(states.device))).to(states.device)

    def states(self, rows: Rows) -> Tensor:
        """The teacher's hidden states [n, H] at the labelled positions of rows of plain text."""
        device = rows.ids.device
        with torch.no_grad():
            return row_states(self._on(device), rows.to(self._device(device))).to(device)

    def _device(self, device: torch.device) -> torch.device:
        """Where the teacher computes for a student on `device`."""
        return device if self.options.device is None else torch.device(self.options.device)

    def _on(self, device: torch.device) -> MicroVLM:
        if self.model.memory_prior.device != self._device(device):
            self.model = self.model.to(self._device(device))
        return self.model
