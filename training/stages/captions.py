"""Stage `captions`: trains any parts of a model on pictures with captions, questions and episodes.

The stages of EVO-1 (arXiv 2511.04555) are settings of it: the first trains the new parts while both pretrained ones are
frozen, so that gradients of random heads do not deform them; the second releases the decoder's last layers at a lower
rate. With a teacher it distils a float decoder into a ternary one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.errors import UserError
from microvlm.model.microvlm import MicroVLM
from microvlm.model.vision import normalise
from microvlm.training.batches.batch_share import BatchShare
from microvlm.training.batches.caption_batches import CaptionBatch, CaptionSampler
from microvlm.training.batches.conversation_rows import ConversationRows, Rows, prompt_mask
from microvlm.training.batches.sample_texts import CAPTION_PROMPTS, IGNORED
from microvlm.training.data.caption_data import CaptionData, fingerprint, open_data
from microvlm.training.data.mixture import Mixture
from microvlm.training.losses.alignment_loss import AlignmentHeads, alignment_loss, chance_loss
from microvlm.training.losses.gathering import gather_rows
from microvlm.training.losses.loss_terms import binary_loss
from microvlm.training.losses.memory_episodes import EpisodeReading, read_episodes, slots_of_rows
from microvlm.training.parameter_selection import relative_rates
from microvlm.training.recipe import StageConfig
from microvlm.training.stages.caption_evaluation import CaptionEvaluation
from microvlm.training.stages.caption_pictures import draw_attention
from microvlm.training.stages.distillation import Teacher
from microvlm.training.stages.picture_encoding import vision_features
from microvlm.training.stages.task import DataFolder, StageInputs, WholeModelTask
from microvlm.training.watching import names


class OpenedData(NamedTuple):
    """The data sets of a run and their weights."""

    sources: tuple[tuple[CaptionData, float], ...]


class ModelWithAlignment(nn.Module):
    """The model with the alignment heads, which exist in training only."""

    def __init__(self, model: MicroVLM):
        super().__init__()
        self.model = model
        self.alignment = AlignmentHeads(model.config.text.hidden_size)


class CaptionTask(WholeModelTask):
    """Cross-entropy of answers with the memory masked, strange, empty and on; alignment; KLs; scope; distillation."""

    keeps_frozen_parts_out = True
    shares_batches = True

    def __init__(self, inputs: StageInputs):
        super().__init__(inputs)
        self.options = self.stage.caption
        self.with_heads = ModelWithAlignment(self.model)
        self.module = self.with_heads
        self.conversations = ConversationRows(self.rows.processor)
        data: OpenedData = inputs.data
        self.data = data
        self.mixture = Mixture(data.sources, self.recipe.seed)
        self.processes = inputs.processes
        self.whole_sampler = self._sampler(0, 1)
        self.sampler = self._sampler(self.processes.index, self.processes.count)
        self.rates = relative_rates((name for name, _ in self.model.named_parameters()), self.options.trained)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.rates.get(name, 0.0) > 0)
        self.vision_learns = any(p.requires_grad for p in self.model.vision.parameters())
        self.teacher = Teacher(self.options.teacher, inputs) if self.options.teacher else None
        self.evaluation = CaptionEvaluation(self, inputs.text)
        self._memory: tuple[Tensor, ...] = ()
        self._keys: Tensor | None = None

    @classmethod
    def check(cls, stage: StageConfig) -> None:
        super().check(stage)
        if all(rate == 0 for rate in stage.caption.trained.values()):
            raise UserError(
                f"stage '{stage.name}' trains nothing: give its `trained` a part with a rate above 0."
            )
        trained = {name.split(".")[0] for name, rate in stage.caption.trained.items() if rate > 0}
        random = [part for part in stage.fresh if part not in trained and "all" not in trained]
        if random:
            raise UserError(
                f"stage '{stage.name}' begins {random[0]} anew and does not train it: name it in `trained` too."
            )

    @classmethod
    def open_data(cls, folders: Sequence[DataFolder]) -> OpenedData:
        return OpenedData(tuple((open_data(path), weight) for path, weight in folders))

    @classmethod
    def tokenizer_texts(cls, data: OpenedData) -> Iterable[str]:
        yield from CAPTION_PROMPTS
        for source, _ in data.sources:
            for text in source.texts("train"):
                yield text
                yield f" {text}"

    @classmethod
    def epoch_samples(cls, data: OpenedData) -> int:
        return sum(source.count("train") for source, _ in data.sources)

    @classmethod
    def describe_data(cls, data: OpenedData) -> list[dict[str, Any]]:
        return [
            {
                "name": source.name,
                "weight": weight,
                "samples": source.count("train"),
                "sha256": fingerprint(source),
            }
            for source, weight in data.sources
        ]

    def parameter_groups(self) -> list[dict]:
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(self.rates[name], []).append(parameter)
        if self.options.alignment_weight:
            groups.setdefault(1.0, []).extend(self.with_heads.alignment.parameters())
        else:
            self.with_heads.alignment.requires_grad_(False)
        base = self.stage.learning_rate
        return [{"params": groups[rate], "lr": rate * base} for rate in sorted(groups, reverse=True)]

    def _sampler(self, process: int, processes: int) -> CaptionSampler:
        return CaptionSampler(
            self.conversations,
            self.stage,
            self.config.vision,
            self.config.memory.slots,
            self.config.prompt.caption_prompt,
            process,
            processes,
        )

    def prepare(self) -> None:
        self.evaluation.prepare()

    def draw(self, generator: torch.Generator) -> CaptionBatch:
        return self.draw_step(0, generator)

    def draw_step(self, step: int, generator: torch.Generator) -> CaptionBatch:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        first = step * self.stage.batch_size
        samples = [self.mixture.sample(first + number) for number in range(self.stage.batch_size)]
        return self.sampler.batch(samples, rng)

    def keys(self, batch: CaptionBatch) -> list[str]:
        return batch.keys

    def size(self, batch: CaptionBatch) -> tuple[int, int]:
        return len(batch.keys), batch.share.row_tokens + batch.share.answer_tokens

    def heads(self) -> nn.Module:
        return self.with_heads.alignment

    def memory(self) -> tuple[Tensor, ...]:
        return self._memory

    def encode(self, model: MicroVLM, pixels: Tensor) -> Tensor:
        """Prefix embeddings [N, k, H] of uint8 pictures [N, 3, S, S]."""
        device = model.memory_prior.device
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.vision_learns):
            scaled = pixels.to(device, non_blocking=True).float() / 255
            features = vision_features(model, normalise(scaled, self.config.vision))
        return model.adapter(features)

    def loss(self, module: ModelWithAlignment, batch: CaptionBatch) -> tuple[Tensor, dict[str, Tensor]]:
        model, options = module.model, self.options
        prefixes = self.encode(model, batch.pixels)
        reading = self._read(model, batch, prefixes)
        rows = batch.rows.to(prefixes.device)
        images = int((rows.ids == self.rows.processor.image_id).sum()) // self.config.prefix_tokens
        embeds = model.place_images(rows.ids, self.rows.processor.image_id, prefixes[:images])
        direct, unknown_scope, extra = self._direct(model, batch, rows, embeds, reading)
        loss, metrics = direct, {names.LM_LOSS: direct}
        for name, (weight, value) in extra.items():
            loss = loss + weight * value
            metrics[name] = value
        if reading is not None and batch.episodes is not None:
            share, asked = batch.share, len(reading.scope)
            episode = self._episode(model, batch.episodes.answers.to(prefixes.device), reading, share)
            memory, addressing, known = (
                share.part(value, asked, share.episodes)
                for value in (reading.memory_kl, reading.addressing_kl, binary_loss(reading.scope, 1.0))
            )
            unknown = share.part(binary_loss(unknown_scope, 0.0), len(unknown_scope), share.seeing)
            loss = loss + (share.episodes / share.rows) ** 0.5 * episode
            loss = loss + options.memory_kl_weight * memory
            loss = loss + options.addressing_kl_weight * addressing
            loss = loss + options.scope_weight * 0.5 * (known + unknown)
            metrics |= {
                "train/episode_loss": episode,
                names.MEMORY_KL: memory,
                names.ADDRESSING_KL: addressing,
                "train/scope_loss": 0.5 * (known + unknown),
            }
        if options.alignment_weight and batch.share.has_row.sum() > 1:
            alignment, chance = self._align(module, batch, rows, prefixes, embeds)
            loss = loss + options.alignment_weight * alignment
            metrics |= {names.ALIGNMENT_LOSS: alignment, names.ALIGNMENT_CHANCE: chance}
        return loss, metrics

    @contextmanager
    def evaluated_on(self, tensors: dict[str, Tensor]) -> Iterator[ModelWithAlignment]:
        own = self.model, self.with_heads
        with torch.device("meta"):
            copy = ModelWithAlignment(MicroVLM(self.config))
        copy.load_state_dict(tensors, assign=True)
        self.model, self.with_heads = copy.model, copy
        try:
            yield copy
        finally:
            self.model, self.with_heads = own

    def evaluate(self, run: Path, step: int) -> dict[str, float]:
        return self.evaluation.run(run, step)

    def draw_pictures(
        self, module: ModelWithAlignment, batch: CaptionBatch, folder: Path, step: int
    ) -> tuple[dict[str, Path], dict[str, float]]:
        return draw_attention(self, module.model, batch, self._keys, folder, step)

    def _read(self, model: MicroVLM, batch: CaptionBatch, prefixes: Tensor) -> EpisodeReading | None:
        """Write and read the batch's episodes; None if it has none."""
        if batch.episodes is None:
            return None
        pictures = torch.from_numpy(batch.captioned).to(prefixes.device)
        reading = read_episodes(
            model,
            self.conversations,
            batch,
            batch.episodes,
            prefixes[pictures],
            self.rows.processor.image_id,
            self.options.address_log_variance,
            group=self.processes.group,
        )
        self._memory = tuple(part[:1].detach() for part in reading.state)
        self._keys = reading.keys.detach()
        return reading

    def _episode(self, model: MicroVLM, answers: Rows, reading: EpisodeReading, share: BatchShare) -> Tensor:
        labelled = answers.labels != IGNORED
        logits = model(model.embed(answers.ids), answers.mask, reading.slot, None, labelled)
        return self._cross_entropy(logits, answers.labels[labelled], share, share.answer_tokens)

    def _cross_entropy(self, logits: Tensor, target: Tensor, share: BatchShare, tokens: int) -> Tensor:
        """This process's part of the mean over all `tokens` of the batch; logits [n, V], target [n]."""
        loss = F.cross_entropy(logits.float(), target, label_smoothing=self.stage.label_smoothing)
        return share.part(loss, len(target), tokens)

    def _direct(
        self,
        model: MicroVLM,
        batch: CaptionBatch,
        rows: Rows,
        embeds: Tensor,
        reading: EpisodeReading | None,
    ) -> tuple[Tensor, Tensor, dict[str, tuple[float, Tensor]]]:
        """Cross-entropy of rows that see their pictures; the scope of what they see of a memory; a teacher's losses."""
        memories = torch.from_numpy(batch.visible_memory).to(embeds.device)
        slot, visible, scope = None, None, embeds.new_zeros(0)
        if self.options.episode_length and batch.share.seeing > 0:
            queries = model.memory_encode(embeds.detach(), prompt_mask(rows.mask, rows.labels))
            state = None if reading is None else reading.state
            slot, visible, scope = slots_of_rows(model, memories, queries, state)
        labelled = rows.labels != IGNORED
        if self.teacher is not None:
            logits, extra = self.teacher.compare(model, batch, rows, embeds, slot, visible, labelled)
        else:
            logits = model(embeds, rows.mask, slot, visible, labelled)
            extra = {}
        loss = self._cross_entropy(logits, rows.labels[labelled], batch.share, batch.share.row_tokens)
        return loss, scope, extra

    def _align(
        self, module: ModelWithAlignment, batch: CaptionBatch, rows: Rows, prefixes: Tensor, embeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(alignment loss of all captioned pictures of the batch, its chance level)."""
        chosen = np.flatnonzero(batch.caption_row >= 0)
        pictures = torch.from_numpy(batch.captioned[chosen]).to(prefixes.device)
        which = torch.from_numpy(batch.caption_row[chosen]).to(prefixes.device)
        image, text = module.alignment.features(prefixes[pictures], embeds[which], rows.labels[which])
        counts = batch.share.aligned_counts()
        image, text = (gather_rows(side, counts, self.processes.group) for side in (image, text))
        captions = [batch.caption_texts[index] for index in np.flatnonzero(batch.share.has_row)]
        loss = alignment_loss(image, text, module.alignment.scale(), captions)
        return loss, torch.tensor(chance_loss(captions))
