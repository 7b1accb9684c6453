"""Runs a recipe: its stages one after the other, each starting from the last one's weights, resumable at any step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from microvlm.config import MicroVLMConfig, QuantizationConfig
from microvlm.errors import UserError
from microvlm.formats.weight_format import WeightFormat
from microvlm.inputs.processor import Processor
from microvlm.model.checkpoint import load_strictly, read_tensors, save_checkpoint
from microvlm.model.lowering import lower
from microvlm.model.microvlm import MicroVLM
from microvlm.presets import preset
from microvlm.training.batches.sample_texts import TextRows, corpus
from microvlm.training.data.emoji import EmojiData
from microvlm.training.recipe import Recipe, StageConfig
from microvlm.training.run_provenance import recorded_runs
from microvlm.training.stages.distill import DistillTask
from microvlm.training.stages.recall import RecallTask
from microvlm.training.stages.scope import ScopeTask
from microvlm.training.stages.vlm import VLMTask
from microvlm.training.tokenizer_training import save_tokenizer, train_tokenizer
from microvlm.training.training_loop import Task, run_stage
from microvlm.training.warm_start import start_from, weights_sha256

Log = Callable[[str], None]
CHECKPOINT = "checkpoint"
WHOLE_MODEL: tuple[type[VLMTask] | type[RecallTask] | type[ScopeTask], ...] = (VLMTask, RecallTask, ScopeTask)
"""Tasks that have a whole model, which a stored checkpoint can start."""


def train(
    recipe: Recipe,
    emoji: EmojiData,
    out: Path,
    log: Log,
    float_control: bool = False,
    stop_after: int | None = None,
    start: str | None = None,
    start_stage: str | None = None,
    fresh: Sequence[str] = (),
    workers: int = 0,
) -> bool:
    """Train into `out` (a folder a stage, then `checkpoint`). Returns whether the recipe is finished.

    `float_control` runs the same recipe with every weight in float32: what ternary costs is the paired difference.
    `start` is a checkpoint that stands for the stages before `start_stage`, which are not run; of its parts, those in
    `fresh` begin anew. `workers` processes draw batches ahead of the steps.
    Raises UserError when `out` belongs to another recipe or another start.
    """
    skipped = _stages_before(recipe, start, start_stage)
    if start is not None:
        # Before anything is written: a start that does not fit must not claim the folder.
        start_from(MicroVLM(stage_config(recipe, recipe.stages[skipped], float_control)), start, fresh)
    run = {"recipe": recipe.to_dict(), "float_control": float_control}
    if start is not None:
        begun = {"weights_sha256": weights_sha256(start), "stage": start_stage}
        run |= {"start": begun | ({"fresh": sorted(fresh)} if fresh else {})}
    _claim(out, recipe.stages[skipped].name, run, preset(recipe.preset))
    torch.manual_seed(recipe.seed)
    log(f"recipe '{recipe.name}' into {out}, {len(recipe.stages)} stages")
    tokenizer = train_tokenizer(corpus(emoji), preset(recipe.preset).text.vocab_size)
    previous: Path | None = None
    for index, stage in enumerate(recipe.stages):
        if index < skipped:
            continue
        folder = out / stage.name
        if not (folder / "done").is_file():
            task = _task(recipe, stage, emoji, tokenizer, float_control)
            if not (folder / "progress.json").is_file():
                if previous is not None:
                    _inherit(task, previous, stage)
                elif start is not None:
                    _start(task, start, fresh, log)
            if not run_stage(task, recipe, index, folder, log, stop_after, workers):
                log(f"stopped in stage {stage.name}; run the same command to go on")
                return False
            _save_weights(task, folder)
        previous = folder
    finish(recipe, out, tokenizer, run)
    log(f"checkpoint written to {out / CHECKPOINT}")
    return True


def stage_config(recipe: Recipe, stage: StageConfig, float_control: bool) -> MicroVLMConfig:
    """The preset with the widths that this stage trains; vision is trained in float and rounded at the end."""
    ternary = stage.decoder_bits == 1.58 and not float_control
    widths = QuantizationConfig(1.58 if ternary else 32, 32, 8 if ternary else 32)
    return dataclasses.replace(preset(recipe.preset), quantization=widths)


def finish(recipe: Recipe, out: Path, tokenizer: Tokenizer, run: dict[str, Any]) -> None:
    """Lower the last stage's model to what is shipped: trits, int8 vision, int8 embedding; no latent weights.

    `run` is what the folder's recipe.json says of the recipe; it goes into the checkpoint's training.json, beside the
    model's own config.json.
    """
    stage, float_control = recipe.stages[-1], bool(run["float_control"])
    model = load_stage(recipe, stage, out / stage.name, float_control)
    if not float_control:
        shipped = preset(recipe.preset).quantization
        model = lower(model, WeightFormat(1.58, "2bit", 8))
        model.config = dataclasses.replace(model.config, quantization=shipped)
    target = out / CHECKPOINT
    save_checkpoint(model, target)
    save_tokenizer(tokenizer, model.config, target)
    runs = recorded_runs(out, (stage.name for stage in recipe.stages))
    provenance = {**run, "torch": torch.__version__, "runs": runs}
    (target / "training.json").write_text(json.dumps(provenance, indent=2) + "\n")


def load_stage(recipe: Recipe, stage: StageConfig, folder: Path, float_control: bool) -> MicroVLM:
    model = MicroVLM(stage_config(recipe, stage, float_control))
    tensors, _ = read_tensors(folder / "weights.safetensors")
    load_strictly(model, tensors, str(folder / "weights.safetensors"))
    return model.eval()


def _task(
    recipe: Recipe, stage: StageConfig, emoji: EmojiData, tokenizer: Tokenizer, float_control: bool
) -> Task:
    config = stage_config(recipe, stage, float_control)
    if stage.task == "distill":
        return DistillTask(config, recipe, stage, emoji)
    task = dict(zip(("vlm", "recall", "scope"), WHOLE_MODEL, strict=True))[stage.task]
    return task(MicroVLM(config), TextRows(Processor(tokenizer, config)), recipe, stage, emoji)


def _inherit(task: Task, previous: Path, stage: StageConfig) -> None:
    """Weights of the last stage: a whole model but for its `fresh` parts, or the vision encoder and the emoji head of a
    student."""
    tensors, _ = read_tensors(previous / "weights.safetensors")
    if not isinstance(task, WHOLE_MODEL):
        raise UserError("a distill stage comes first in a recipe: it starts from nothing.")
    if set(tensors) == set(task.model.state_dict()):
        first = task.model.state_dict()
        begun = {
            name: first[name] if name.split(".")[0] in stage.fresh else tensors[name] for name in tensors
        }
        load_strictly(task.model, begun, str(previous))
        return
    if not isinstance(task, VLMTask):
        raise UserError(f"a {stage.task} stage needs a whole model: put a vlm stage before it.")
    for part, module in (("vision.", task.model.vision), ("classify.", task.module.classify)):
        own = {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
        load_strictly(module, own, str(previous))


def _stages_before(recipe: Recipe, start: str | None, start_stage: str | None) -> int:
    """How many stages a start stands for. Raises UserError when the two options do not go together."""
    if start is None and start_stage is None:
        return 0
    names = [stage.name for stage in recipe.stages]
    if start is None or start_stage is None:
        raise UserError(
            "--start and --start-stage go together: the checkpoint, and the first stage to run from it."
        )
    if start_stage not in names:
        raise UserError(
            f"recipe '{recipe.name}' has no stage '{start_stage}'; choose one of {', '.join(names)}."
        )
    index = names.index(start_stage)
    if recipe.stages[index].task == "distill":
        raise UserError(f"stage '{start_stage}' starts from nothing: choose a later --start-stage.")
    return index


def _start(task: Task, start: str, fresh: Sequence[str], log: Log) -> None:
    assert isinstance(task, WHOLE_MODEL)  # `_stages_before` refuses the others
    absent = start_from(task.model, start, fresh)
    log(f"starting from {start}" + (f"; not from it: {', '.join(absent)}" if absent else ""))


def _save_weights(task: Task, folder: Path) -> None:
    from safetensors.torch import save_file

    aside = folder / "weights.tmp"
    kept = task.model if isinstance(task, WHOLE_MODEL) else task.module
    save_file({k: v.detach().cpu().contiguous() for k, v in kept.state_dict().items()}, str(aside))
    aside.replace(folder / "weights.safetensors")
    (folder / "done").touch()


def _claim(out: Path, first_stage: str, run: dict[str, Any], model: MicroVLMConfig) -> None:
    """The folder's recipe and the model that its preset meant, written once; others are refused rather than mixed."""
    wanted = json.loads(json.dumps({**run, "preset": model.to_dict()}))
    path = out / "recipe.json"
    if path.is_file():
        # A folder that was begun before presets were written into it says nothing about its own.
        if {"preset": wanted["preset"]} | json.loads(path.read_text()) != wanted:
            raise UserError(f"{out} holds another run ({path}): choose another --output or delete it.")
        return
    if out.exists() and any(out.iterdir()) and not (out / first_stage).exists():
        raise UserError(f"{out} exists and is no training folder: choose another --output.")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted, indent=2) + "\n")
