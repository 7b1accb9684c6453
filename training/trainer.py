"""Runs a recipe: trains its stages one after another, each from the weights of the one before. Resumable at any step.

The boundary to the data: the trainer, the stages and the score command know it as one `EmojiData` (data/emoji.py),
which they pass on. docs/training.md lists what they use of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from microvlm.atomic import new_file, write_file
from microvlm.config import MicroVLMConfig, QuantizationConfig
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import quote
from microvlm.formats.weight_format import WeightFormat
from microvlm.inputs.processor import Processor
from microvlm.model.checkpoint import load_strictly, read_tensors, save_checkpoint, write_tensors
from microvlm.model.lowering import lower
from microvlm.model.microvlm import MicroVLM
from microvlm.presets import preset
from microvlm.temporary_folder import remove_leftovers
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.emoji.data.emoji import EmojiData
from microvlm.training.emoji.stages.distill import DistillTask
from microvlm.training.emoji.stages.recall import RecallTask
from microvlm.training.emoji.stages.scope import ScopeTask
from microvlm.training.emoji.stages.vlm import VLMTask
from microvlm.training.recipe import Recipe, StageConfig
from microvlm.training.run_provenance import recorded_runs
from microvlm.training.stages.task import StageInputs, Task, WholeModelTask
from microvlm.training.tokenizer_training import save_tokenizer, tokenizer_corpus, train_tokenizer
from microvlm.training.training_loop import run_stage
from microvlm.training.warm_start import start_from, weights_sha256

Log = Callable[[str], None]
CHECKPOINT = "checkpoint"
TASKS: dict[str, type[Task]] = {
    "distill": DistillTask,
    "vlm": VLMTask,
    "recall": RecallTask,
    "scope": ScopeTask,
}
"""A stage's `task` in a recipe -> the class that trains it. A new kind of stage is one module and one entry."""


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
    """Train into `out`: a folder per stage, then `checkpoint`. Returns whether the recipe is finished.

    float_control : train every weight in float32; the paired difference of the scores is the cost of ternary weights.
    stop_after : save and stop after this many steps. start : a checkpoint that replaces the stages before
    `start_stage`. fresh : parts of the model that are not taken from `start`. workers : processes that draw batches
    ahead of the steps.

    Raises UserError for an unknown task, a start that does not fit, and an `out` that belongs to another run.
    """
    _check_stages(recipe)
    skipped = _stages_before(recipe, start, start_stage)
    if start is not None:
        # Checked before anything is written: a start that does not fit must not claim the folder.
        start_from(MicroVLM(stage_config(recipe, recipe.stages[skipped], float_control)), start, fresh)
    run = {"recipe": recipe.to_dict(), "float_control": float_control}
    if start is not None:
        begun = {"weights_sha256": weights_sha256(start), "stage": start_stage}
        run |= {"start": begun | ({"fresh": sorted(fresh)} if fresh else {})}
    _claim(out, recipe.stages[skipped].name, run, preset(recipe.preset))
    torch.manual_seed(recipe.seed)
    log(f"recipe '{recipe.name}' into {out}, {len(recipe.stages)} stages")
    tokenizer = train_tokenizer(tokenizer_corpus(emoji), preset(recipe.preset).text.vocab_size)
    previous: Path | None = None
    for index, stage in enumerate(recipe.stages):
        if index < skipped:
            continue
        folder = out / stage.name
        if not (folder / "done").is_file():
            task = _build_task(recipe, stage, emoji, tokenizer, float_control)
            if not (folder / "progress.json").is_file():
                if previous is not None:
                    tensors, _ = read_tensors(previous / "weights.safetensors")
                    task.continue_from(tensors, str(previous))
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
    """The preset with the bit widths that this stage trains; vision is trained in float32 and rounded at the end."""
    ternary = stage.decoder_bits == 1.58 and not float_control
    widths = QuantizationConfig(1.58 if ternary else 32, 32, 8 if ternary else 32)
    return dataclasses.replace(preset(recipe.preset), quantization=widths)


def finish(recipe: Recipe, out: Path, tokenizer: Tokenizer, run: dict[str, Any]) -> None:
    """Write the checkpoint: the last stage's model with packed trits, int8 vision and int8 embedding.

    run : the content of the folder's recipe.json; it goes into the checkpoint's training.json.
    """
    stage, float_control = recipe.stages[-1], bool(run["float_control"])
    model = load_stage(recipe, stage, out / stage.name, float_control)
    if not float_control:
        shipped = preset(recipe.preset).quantization
        model = lower(model, WeightFormat(1.58, "2bit", 8))
        model.config = dataclasses.replace(model.config, quantization=shipped)
    target = out / CHECKPOINT
    runs = recorded_runs(out, (stage.name for stage in recipe.stages))
    provenance = {**run, "torch": torch.__version__, "runs": runs}

    def complete(folder: Path) -> None:
        save_tokenizer(tokenizer, model.config, folder)
        (folder / "training.json").write_text(json.dumps(provenance, indent=2) + "\n")

    save_checkpoint(model, target, complete)


def load_stage(recipe: Recipe, stage: StageConfig, folder: Path, float_control: bool) -> MicroVLM:
    """The model that a finished stage has stored in `folder`."""
    model = MicroVLM(stage_config(recipe, stage, float_control))
    tensors, _ = read_tensors(folder / "weights.safetensors")
    load_strictly(model, tensors, str(folder / "weights.safetensors"))
    return model.eval()


def _check_stages(recipe: Recipe) -> None:
    """Raises UserError for a stage that no task can train, before anything is written or computed."""
    for stage in recipe.stages:
        if stage.task not in TASKS:
            raise UserError(
                f"stage '{stage.name}': unknown task {quote(stage.task)}; use one of {', '.join(TASKS)}."
            )
        TASKS[stage.task].check(stage)
    with torch.device("meta"):
        parts = dict.fromkeys(name.split(".")[0] for name in MicroVLM(preset(recipe.preset)).state_dict())
    for stage in recipe.stages:
        unknown = [part for part in stage.fresh if part not in parts]
        if unknown:
            raise UserError(
                f"stage '{stage.name}': the model has no part {quote(unknown[0])} to begin anew; it has "
                f"{', '.join(parts)}."
            )


def _build_task(
    recipe: Recipe, stage: StageConfig, emoji: EmojiData, tokenizer: Tokenizer, float_control: bool
) -> Task:
    config = stage_config(recipe, stage, float_control)
    rows = TextRows(Processor(tokenizer, config))
    return TASKS[stage.task](StageInputs(config, rows, recipe, stage, emoji))


def _stages_before(recipe: Recipe, start: str | None, start_stage: str | None) -> int:
    """Number of stages that a start replaces. Raises UserError if the two options do not go together."""
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
    if not issubclass(TASKS[recipe.stages[index].task], WholeModelTask):
        raise UserError(f"stage '{start_stage}' starts from nothing: choose a later --start-stage.")
    return index


def _start(task: Task, start: str, fresh: Sequence[str], log: Log) -> None:
    assert isinstance(task, WholeModelTask)  # `_stages_before` refuses the others
    absent = start_from(task.model, start, fresh)
    log(f"starting from {start}" + (f"; not from it: {', '.join(absent)}" if absent else ""))


def _save_weights(task: Task, folder: Path) -> None:
    with new_file(folder / "weights.safetensors") as temporary:
        write_tensors(task.result().state_dict(), temporary)
    (folder / "done").touch()


def _claim(out: Path, first_stage: str, run: dict[str, Any], model: MicroVLMConfig) -> None:
    """Write the run's recipe and its preset's model into the folder, or refuse a folder that belongs to another run."""
    description = json.loads(json.dumps({**run, "preset": model.to_dict()}))
    path = out / "recipe.json"
    if path.is_file():
        # Folders of older versions do not record their preset.
        recorded = documents.load(path, dict[str, Any], f"delete {out}, or choose another --output")
        if {"preset": description["preset"]} | recorded != description:
            raise UserError(f"{out} holds another run ({path}): choose another --output or delete it.")
        return
    remove_leftovers(out)  # of a start that was killed before it had its recipe written
    if out.exists() and any(out.iterdir()) and not (out / first_stage).exists():
        raise UserError(f"{out} exists and is not a training folder: choose another --output.")
    out.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(description, indent=2) + "\n")
