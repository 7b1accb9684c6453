"""Trains a model's decoder for a few steps in each design of ternary layers, on the same batches of the same texts."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from accelerate import Accelerator

from microvlm.bench.provenance import describe_model, provenance, recorded_name
from microvlm.bench.training.ternary_design import DESIGNS, TernaryDesign, bits_per_weight
from microvlm.config import MicroVLMConfig
from microvlm.inputs.processor import Processor
from microvlm.inputs.processor_files import read_documents
from microvlm.inputs.tokenizer import load_tokenizer
from microvlm.model.checkpoint import load_checkpoint, resolve_checkpoint
from microvlm.model.microvlm import MicroVLM
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.batches.token_rows import row_logits
from microvlm.training.heap import map_large_blocks
from microvlm.training.loop.optimizers import usable_precision
from microvlm.training.loop.stage_trainer import StageTrainer, step_generator
from microvlm.training.recipe import Recipe, StageConfig, load_recipe
from microvlm.training.scoring.text_scores import BATCH, estimates, row_sums, spread
from microvlm.training.stages.task import DataFolder, StageInputs
from microvlm.training.stages.texts import TextTask
from microvlm.training.ternary_designs.designed_linear import redesign
from microvlm.training.trainer import stage_config
from microvlm.training.warm_start import begin_sub_norms, start_from

LOGGED_EVERY = 10


@dataclass(frozen=True)
class ComparisonPlan:
    """What is compared, on what, and for how long."""

    start: str
    data: tuple[Path, ...]
    designs: tuple[str, ...]
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    count: int
    """Held-out texts that are scored."""


def compare(plan: ComparisonPlan, log: Callable[[str], None]) -> dict[str, Any]:
    """The document of kind `ternary_designs`. Raises UserError for a start that cannot be a teacher."""
    map_large_blocks()
    recipe = load_recipe("distill-texts")
    stage = msgspec.structs.replace(
        recipe.stages[0],
        epochs=0.0,
        steps=plan.steps,
        batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
    )
    recipe = msgspec.structs.replace(recipe, seed=plan.seed, stages=(stage,))
    folder = resolve_checkpoint(plan.start)
    data = TextTask.open_data([DataFolder(path) for path in plan.data])
    rows = []
    tokens = 0
    for name in plan.designs:  # a design that does not fit is refused before any is trained
        _config(MicroVLMConfig.load(folder), _stage_of(stage, DESIGNS[name]), DESIGNS[name].sub_norm)
    for name in plan.designs:
        design = DESIGNS[name]
        rounding = _Candidate(recipe, design, folder, data, sub_norm=False)
        rounded = rounding.score(plan.count)
        log(f"{name}: KL {rounded['kl']['value']:.2f} nats after rounding")
        candidate = _Candidate(recipe, design, folder, data, sub_norm=design.sub_norm)
        seconds, tokens = candidate.train(log)
        trained = candidate.score(plan.count)
        log(f"{name}: KL {trained['kl']['value']:.2f} nats after {plan.steps} steps")
        rows.append(
            {
                "name": name,
                "description": design.description,
                "bits_per_weight": bits_per_weight(design, candidate.config.text.hidden_size),
                "rounded": rounded,
                "trained": trained,
                "step_seconds": seconds,
            }
        )
    return {
        "report": "ternary_designs",
        "start": recorded_name(plan.start),
        "data": [{"name": source.path.name, "sha256": source.sha256} for source in data],
        "texts": min(plan.count, sum(len(source.validation) for source in data)),
        "training": {
            "steps": plan.steps,
            "batch_size": plan.batch_size,
            "learning_rate": plan.learning_rate,
            "seed": plan.seed,
            "tokens": tokens,
        },
        "rows": rows,
        "provenance": provenance(describe_model(folder), None),
    }


class _Candidate:
    """A design's model, from the weights of the start, and its stage."""

    def __init__(
        self, recipe: Recipe, design: TernaryDesign, start: Path, data: Sequence[Any], sub_norm: bool
    ):
        stage = _stage_of(recipe.stages[0], design)
        self.recipe, self.stage = recipe, stage
        self.config = _config(MicroVLMConfig.load(start), stage, sub_norm)
        self.processor = Processor(load_tokenizer(start), self.config, read_documents(start))
        torch.manual_seed(recipe.seed)
        self.task = TextTask(
            StageInputs(self.config, TextRows(self.processor), recipe, stage, list(data), start)
        )
        absent = start_from(self.task.model, str(start))
        if any("sub_norm" in name for name in absent):
            begin_sub_norms(self.task.model, str(start))
        redesign(self.task.model.decoder, design)
        self.start = start

    def train(self, log: Callable[[str], None]) -> tuple[float, int]:
        """All steps of the stage -> (median seconds of a step, tokens in all)."""
        precision = usable_precision(self.recipe.mixed_precision, log)
        trainer = StageTrainer(self.task, self.stage, precision, Accelerator(mixed_precision="no"))
        seconds, tokens = [], 0
        for step in range(self.stage.steps):
            batch = self.task.draw_step(step, step_generator(self.recipe.seed, 0, step))
            began = time.perf_counter()
            metrics = trainer.step(batch)
            seconds.append(time.perf_counter() - began)
            tokens += self.task.size(batch)[1]
            if (step + 1) % LOGGED_EVERY == 0:
                log(f"step {step + 1} of {self.stage.steps}, loss {float(metrics['loss']):.3f}")
        trainer.release()
        return statistics.median(seconds), tokens

    def score(self, count: int) -> dict[str, Any]:
        """KL from the start, share of equal tokens and cross-entropy on held-out texts."""
        teacher = load_checkpoint(self.start).requires_grad_(False)
        held_out = [text for source in self.task.data for text in source.validation]
        texts = spread(tuple(held_out), count)
        candidates = {"teacher": _logits(teacher), "design": _logits(self.task.model)}
        sums: list[list[float]] = []
        for first in range(0, len(texts), BATCH):
            rows = self.task.token_rows.build(texts[first : first + BATCH])
            sums += row_sums(rows, candidates)["design"]
        return estimates(sums)


def _stage_of(stage: StageConfig, design: TernaryDesign) -> StageConfig:
    stage = msgspec.structs.replace(stage, rotation=design.stream_rotation)
    if design.distilled:
        return stage
    return msgspec.structs.replace(stage, caption=msgspec.structs.replace(stage.caption, teacher=None))


def _config(base: MicroVLMConfig, stage: StageConfig, sub_norm: bool) -> MicroVLMConfig:
    config = stage_config(base, [stage], float_control=False)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, sub_norm=sub_norm))


def _logits(model: MicroVLM) -> Callable[[Any], torch.Tensor]:
    return lambda rows: row_logits(model, rows)
