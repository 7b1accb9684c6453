"""The `captions` task of a measured variant: the recipe's stage, the model and the batch that all variants share."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import msgspec
import torch
from accelerate import Accelerator

from microvlm.bench.training.step_variants import VARIANTS
from microvlm.config import MicroVLMConfig, PromptConfig
from microvlm.errors import UserError
from microvlm.inputs.processor import Processor
from microvlm.inputs.processor_files import read_documents
from microvlm.inputs.tokenizer import load_tokenizer
from microvlm.model.checkpoint import resolve_checkpoint
from microvlm.presets import preset, preset_names
from microvlm.training.batches.caption_batches import CaptionBatch
from microvlm.training.batches.conversation_rows import Exchange
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.caption_options import CaptionOptions
from microvlm.training.data.caption_data import open_data
from microvlm.training.loop.stage_trainer import StageTrainer
from microvlm.training.model_base import ModelBase
from microvlm.training.recipe import Recipe, StageConfig
from microvlm.training.stages.captions import CaptionTask, OpenedData
from microvlm.training.stages.task import StageInputs
from microvlm.training.step_costs.generated_captions import GeneratedCaptions
from microvlm.training.tokenizer_training import train_tokenizer
from microvlm.training.trainer import stage_config

TRAINED = {"all": 1.0, "vision": 0.0}
"""Of every variant: the whole model but its encoder, as the ternary stages of the recipes train it."""
_LOOKED_AT = 16
"""Samples whose mean length says how many rows a batch needs."""


class MeasuredStep(NamedTuple):
    """A variant's trainer, and what its batches are drawn with."""

    trainer: StageTrainer
    config: MicroVLMConfig
    batch_size: int


def build(
    variant: str, model: str, data: str | None, tokens: int, batch_size: int | None, device: str, seed: int
) -> MeasuredStep:
    """The trainer of a variant, with random weights, which take as long as trained ones.

    model : a preset, or a checkpoint, whose sizes and tokenizer are taken. data : a data folder; None for drawn
    pictures. tokens : positions that a batch has at least, where `batch_size` is None. Raises UserError.
    """
    chosen = VARIANTS[variant]
    source = GeneratedCaptions() if data is None else open_data(data)
    opened = OpenedData(((source, 1.0),))
    base = _base(model, opened)
    stage = StageConfig(
        "measured",
        "captions",
        1_000_000,
        decoder_bits=chosen.decoder_bits,
        label_smoothing=0.0,
        caption=CaptionOptions(trained=TRAINED),
    )
    config = stage_config(base.config, [stage], float_control=False)
    rows = TextRows(Processor(base.tokenizer, config, base.documents))
    recipe = Recipe("measured", None, seed, (stage,), mixed_precision=chosen.mixed_precision)
    torch.manual_seed(seed)
    task = CaptionTask(StageInputs(config, rows, recipe, stage, opened))
    size = batch_size or max(2, math.ceil(tokens / _mean_length(task)))
    task.stage = task.sampler.stage = msgspec.structs.replace(stage, batch_size=size)
    return MeasuredStep(
        StageTrainer(task, task.stage, chosen.mixed_precision, _accelerator(device)), config, size
    )


def positions(batch: CaptionBatch) -> int:
    """Positions that pass through the decoder in a step: prefixes, prompts and answers, without padding."""
    count = int(batch.rows.mask.sum())
    return count if batch.episodes is None else count + int(batch.episodes.answers.mask.sum())


def _base(model: str, data: OpenedData) -> ModelBase:
    if model in preset_names():
        # The prompt of a preset that expects a pretrained tokenizer names tokens that a new one lacks.
        config = dataclasses.replace(preset(model), prompt=PromptConfig())
        return ModelBase(config, train_tokenizer(CaptionTask.tokenizer_texts(data), config.text.vocab_size))
    folder = resolve_checkpoint(model)
    return ModelBase(MicroVLMConfig.load(folder), load_tokenizer(folder), read_documents(folder), folder)


def _mean_length(task: CaptionTask) -> float:
    """Mean positions of a row about a picture."""
    exchanges = []
    for number in range(_LOOKED_AT):
        sample = task.mixture.sample(number)
        turn = sample.turns[0]
        exchanges.append(
            Exchange(turn.question or task.config.prompt.caption_prompt, turn.answer, len(turn.images))
        )
    return float(task.conversations.build(exchanges).mask.sum()) / _LOOKED_AT


def _accelerator(device: str) -> Accelerator:
    """Accelerate on this device alone. Raises UserError for one that is not here."""
    kind, _, number = device.partition(":")
    if kind == "cuda":
        if not torch.cuda.is_available() or (number and int(number) >= torch.cuda.device_count()):
            raise UserError(f"--device {device}: PyTorch finds no such GPU here; use cpu.")
        torch.cuda.set_device(int(number or 0))
    return Accelerator(mixed_precision="no", cpu=kind == "cpu")
