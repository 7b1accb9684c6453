"""Runs a recipe: trains its stages one after another, each from the weights of the one before. Resumable at any step.

The trainer knows no data and no task: a task opens its own data (`stages/registry.py`). The model is a preset that is
trained from its beginning, or the checkpoint that a run starts from, which then keeps its own sizes and tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from microvlm.atomic import write_file
from microvlm.config import MicroVLMConfig, QuantizationConfig, Rotation
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import quote
from microvlm.formats.weight_format import WeightFormat
from microvlm.formats.weight_shapes import COLOUR_LAYERS, weight_shapes
from microvlm.inputs.processor import Processor
from microvlm.model.checkpoint import (
    HEADS,
    load_strictly,
    read_tensors,
    read_weights_header,
    resolve_checkpoint,
    save_checkpoint,
)
from microvlm.model.lowering import lower
from microvlm.model.microvlm import MicroVLM
from microvlm.presets import preset
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.budget import Budget, resolve_steps
from microvlm.training.frozen_base import FLOAT_BITS, FOUR_BITS, quantize_frozen
from microvlm.training.heap import map_large_blocks
from microvlm.training.loop.processes import Processes, check_processes
from microvlm.training.loop.run_context import RunContext, write_status
from microvlm.training.loop.run_files import (
    BEST,
    BEST_CHECKPOINT,
    CHECKPOINT,
    CURVES,
    DONE,
    METRICS,
    RECIPE,
    RUN,
    SUMMARY,
    WEIGHTS,
)
from microvlm.training.loop.run_provenance import recorded_runs
from microvlm.training.loop.run_summary import summarize
from microvlm.training.loop.sharding import build_accelerator, check_sharding
from microvlm.training.loop.step_timing import measure_step_seconds
from microvlm.training.loop.training_loop import run_stage
from microvlm.training.model_base import ModelBase
from microvlm.training.parameter_selection import relative_rates
from microvlm.training.recipe import Recipe, StageConfig
from microvlm.training.run_checks import (
    check_decoder,
    check_folder,
    check_rotation,
    check_teachers,
    claim_folder,
    decoder_rotation,
    describe_difference,
    read_description,
    stages_before,
    summarize_names,
)
from microvlm.training.stage_weights import load_heads, restore_dtypes, restore_packed, save_weights
from microvlm.training.stages.registry import task_class
from microvlm.training.stages.task import DataFolder, StageInputs, Task, WholeModelTask
from microvlm.training.time_to_score.score_target import ScoreTarget
from microvlm.training.warm_start import (
    begin_sub_norms,
    start_from,
    stored_dtypes,
    take_decoder,
    weights_sha256,
)
from microvlm.training.watching.plots import curves
from microvlm.training.watching.run_name import next_run_name
from microvlm.training.watching.tracking import Tracking, accelerator_options

Log = Callable[[str], None]
STAGE_SEED = 1_000_003
_NEW_WITH_TERNARY = "sub_norm"
"""Parameters that a decoder gets when it becomes ternary, and that no start has."""


def open_data(recipe: Recipe, folders: Sequence[DataFolder]) -> Any:
    """Open the data that the recipe's tasks train on. Raises UserError."""
    classes = [task_class(stage.task, stage.name) for stage in recipe.stages]
    if len({cls.open_data.__func__ for cls in classes}) > 1:  # type: ignore[attr-defined]
        raise UserError(f"recipe '{recipe.name}' mixes stages on emoji and on captions: make two recipes.")
    return classes[0].open_data(folders)


def train(
    recipe: Recipe,
    data: Any,
    out: Path,
    log: Log,
    float_control: bool = False,
    stop_after: int | None = None,
    start: str | None = None,
    start_stage: str | None = None,
    fresh: Sequence[str] = (),
    workers: int = 0,
    *,
    budget: Budget | None = None,
    trackers: Sequence[str] = (),
    text: Path | None = None,
    base_bits: int = 32,
    until: ScoreTarget | None = None,
    decoder_from: str | None = None,
) -> bool:
    """Train into `out`: a folder per stage, then `checkpoint`. Returns whether the recipe is finished.

    data : what `open_data` returned. float_control : train every weight in float32; the paired difference of the scores
    is the cost of ternary weights. stop_after : save and stop after this many steps. start : the checkpoint that the
    run starts from; with `start_stage` it replaces the stages before. fresh : parts of the model that are not taken
    from it. workers : processes that draw batches ahead of the steps. budget : length of the run in place of the
    recipe's. trackers : where metrics go beside metrics.jsonl. text : plain text on which the decoder is evaluated.
    base_bits : width of the frozen decoder in memory, 32 or 4. until : the score that ends the last stage.
    decoder_from : the checkpoint whose decoder the run begins with in place of the start's; a teacher stays the start.

    Raises UserError for an unknown task, a start that does not fit, and an `out` that belongs to another run.
    """
    run = TrainingRun(
        recipe, data, out, log, float_control, start, start_stage, fresh, text, base_bits, decoder_from
    )
    if until is not None and run.processes.count > 1:
        raise UserError("--until measures a run of one process: leave it out, or start one process.")
    run.claim(budget)
    return run.train(stop_after, workers, trackers, until)


class TrainingRun:
    """One run: its recipe, the model that it starts from and its folder."""

    def __init__(
        self,
        recipe: Recipe,
        data: Any,
        out: Path,
        log: Log,
        float_control: bool = False,
        start: str | None = None,
        start_stage: str | None = None,
        fresh: Sequence[str] = (),
        text: Path | None = None,
        base_bits: int = 32,
        decoder_from: str | None = None,
    ):
        map_large_blocks()
        self.processes = Processes.join()
        self.recipe, self.data, self.out = recipe, data, out
        self.log: Log = log if self.processes.is_main else lambda _: None
        self.float_control, self.fresh, self.text = float_control, tuple(fresh), text
        self.base_bits, self.decoder_from = base_bits, decoder_from
        self.classes = [task_class(stage.task, stage.name) for stage in recipe.stages]
        for cls, stage in zip(self.classes, recipe.stages, strict=True):
            cls.check(stage)
        check_processes(self.processes, recipe.stages, [cls.shares_batches for cls in self.classes])
        check_sharding(self.processes, recipe.stages, base_bits)
        check_teachers(recipe)
        self.skipped = stages_before(recipe, self.classes, start, start_stage)
        self.start, self.start_stage = start if start is not None else recipe.start, start_stage
        self.given_start = start is not None
        self.base = ModelBase.of(recipe, start, start_stage, lambda: self.classes[0].tokenizer_texts(data))
        self.rotation: Rotation = 0 if decoder_from is None else decoder_rotation(decoder_from)
        if decoder_from is not None:
            check_decoder(decoder_from, start, self.base, lambda: self.config(self.skipped), self.fresh)
        check_rotation(self.base, self.config(self.skipped))
        self._check_fresh()
        self._check_trained()
        if start is not None and (decoder_from is not None or not self.base.keeps_start):
            # Checked before anything is written: a start that does not fit must not claim the folder.
            self._load_start(MicroVLM(self.config(self.skipped)), self.skipped)

    def config(self, index: int) -> MicroVLMConfig:
        """The model's configuration in a stage."""
        stages = self.recipe.stages[: index + 1]
        keeps_ternary = self.base.keeps_start and self.base.config.quantization.is_ternary
        base = self.base.config
        if self.rotation:  # the start's decoder, which has none, is rotated like the one that takes its place
            base = dataclasses.replace(base, text=dataclasses.replace(base.text, rotation=self.rotation))
        return stage_config(base, stages, self.float_control, keeps_ternary)

    def task(self, index: int) -> Task:
        stage = self.recipe.stages[index]
        config = self.config(index)
        rows = TextRows(Processor(self.base.tokenizer, config, self.base.documents))
        folder = None if self.start is None else resolve_checkpoint(self.start)
        return self.classes[index](
            StageInputs(config, rows, self.recipe, stage, self.data, folder, self.text, self.processes)
        )

    def claim(self, budget: Budget | None = None) -> None:
        """Resolve the length of the run, and write its description into the folder; or resume what is there.

        Raises UserError for a folder that belongs to another run, and for a budget in time of several processes.
        """
        if budget is not None and budget.seconds and self.processes.count > 1:
            raise UserError("a budget in time is measured in one process: give --budget a number of steps.")
        self.recipe = self.processes.on_main(lambda: self._claimed(budget))

    def _claimed(self, budget: Budget | None) -> Recipe:
        """The recipe with its lengths resolved, after the folder is claimed."""
        description = self._describe(budget)
        recorded = read_description(self.out)
        if recorded is not None:
            asked = {"preset": description["preset"]} | {k: v for k, v in recorded.items() if k != "resolved"}
            if isinstance(asked["preset"], dict):  # as this version writes it
                written = MicroVLMConfig.from_dict(asked["preset"], self.out / RECIPE).to_dict()
                asked["preset"] = json.loads(json.dumps(written))
            if asked != description and (self.out / self.recipe.stages[self.skipped].name).exists():
                raise UserError(describe_difference(self.out, asked, description))
            resolved = recorded.get("resolved")
            if resolved is not None and asked == description:
                return documents.convert(resolved, Recipe, self.out / RECIPE, "delete the folder")
            if asked == description:
                return self.recipe
        check_folder(self.out, self.recipe.stages[self.skipped].name)
        recipe = resolve_steps(
            self.recipe,
            self.classes[0].epoch_samples(self.data),
            budget,
            lambda index: measure_step_seconds(self.task(index), self.recipe, index),
            self.skipped,
        )
        if json.loads(json.dumps(recipe.to_dict())) != description["recipe"]:
            description["resolved"] = recipe.to_dict()
        claim_folder(self.out, recipe.stages[self.skipped].name, description)
        return recipe

    def train(
        self, stop_after: int | None, workers: int, trackers: Sequence[str], until: ScoreTarget | None = None
    ) -> bool:
        """Train the stages that are not done. Returns whether the recipe is finished."""
        recipe, log = self.recipe, self.log
        torch.manual_seed(recipe.seed)
        log(f"recipe '{recipe.name}' into {self.out}, {len(recipe.stages)} stages")
        context = self._context(workers, trackers)
        context.target = until
        try:
            complete = self._train_stages(context, stop_after)
        finally:
            context.tracking.close()
        if complete and self.processes.is_main:
            self.finish()
            curves(self.out / METRICS, self.out / CURVES)
            self._write_summary()
            write_status(context, "finished", context.total_steps)
            log(f"checkpoint written to {self.out / CHECKPOINT}")
        self.processes.wait()
        return complete

    def _train_stages(self, context: RunContext, stop_after: int | None) -> bool:
        previous: int | None = None
        for index, stage in enumerate(self.recipe.stages):
            if index < self.skipped:
                continue
            folder = self.out / stage.name
            if not (folder / DONE).is_file():
                # Not the generator of the stage before: a resumed process has not run that stage.
                torch.manual_seed(self.recipe.seed + STAGE_SEED * index)
                task = self.task(index)
                self._begin(task, index, previous)
                if self.base_bits == FOUR_BITS and isinstance(task, WholeModelTask):
                    count = quantize_frozen(task.model.decoder, context.accelerator.device)
                    self.log(f"{stage.name}: {count} frozen layers of the decoder are held at four bits")
                if not run_stage(task, self.recipe, index, context, stop_after):
                    self.log(f"stopped in stage {stage.name}; the same command with -o {self.out} goes on")
                    return False
                save_weights(task, folder, self.processes)
                del task
            previous = index
            context.first_step += stage.steps
        return True

    def _begin(self, task: Task, index: int, previous: int | None) -> None:
        """Give a stage its first weights: those of the stage before, or of the run's start."""
        if previous is not None:
            path = self.out / self.recipe.stages[previous].name / WEIGHTS
            if self.classes[previous].keeps_frozen_parts_out and isinstance(task, WholeModelTask):
                tensors = task.model.state_dict() | self.load_stage(previous, path).state_dict()
            else:
                tensors, _ = read_tensors(path)
            task.continue_from(tensors, str(path.parent))
            load_heads(task, path.with_name(HEADS))
        elif self.start is not None:
            assert isinstance(task, WholeModelTask)  # `_stages_before` refuses the others
            absent = self._load_start(task.model, index)
            if any(name.startswith("decoder.") and _NEW_WITH_TERNARY in name for name in absent):
                begin_sub_norms(task.model, self.start)
            load_heads(task, resolve_checkpoint(self.start) / HEADS)
            self.log(
                f"starting from {self.start}"
                + (f", the decoder from {self.decoder_from}" if self.decoder_from else "")
                + (f"; not from it: {summarize_names(absent)}" if absent else "")
            )

    def _load_start(self, model: MicroVLM, index: int) -> list[str]:
        """Load the run's start into a model; returns the parameters that it lacks."""
        assert self.start is not None
        given = self.fresh if self.given_start else self.recipe.stages[index].fresh
        absent = start_from(model, self.start, given)
        new = (_NEW_WITH_TERNARY, *(COLOUR_LAYERS if self.base.adds_colours else ()))
        unexpected = [
            name
            for name in absent
            if name.split(".")[0] not in given and not any(part in name for part in new)
        ]
        if unexpected and self.base.keeps_start:
            raise UserError(
                f"'{self.start}' lacks {quote(unexpected[0])}: it is no whole model; assemble it again."
            )
        if self.decoder_from is not None:
            taken = take_decoder(model, self.decoder_from)
            absent = [name for name in absent if name not in taken]
        return absent

    def finish(self) -> None:
        """Write `checkpoint`, and `best` with the weights of the lowest evaluation loss, if there were evaluations."""
        index = len(self.recipe.stages) - 1
        folder = self.out / self.recipe.stages[index].name
        self._write_checkpoint(index, folder / WEIGHTS, self.out / CHECKPOINT)
        if (folder / BEST).is_file():
            self._write_checkpoint(index, folder / BEST, self.out / BEST_CHECKPOINT)

    def _write_summary(self) -> None:
        """Write the run's report from its own files."""
        described = self.classes[0].describe_data(self.data)
        named = ", ".join(entry["name"] for entry in described) if described else "emoji"
        samples = self.classes[0].epoch_samples(self.data)
        stages = self.recipe.stages[self.skipped :]
        document = summarize(self.out, self.recipe.name, stages, self.base.config.name, named, samples)
        write_file(self.out / SUMMARY, json.dumps(document, indent=1) + "\n")

    def _write_checkpoint(self, index: int, weights: Path, target: Path) -> None:
        """Write a stage's model: packed if it is ternary, else with untouched weights at their stored precision."""
        model = self.load_stage(index, weights)
        if model.config.quantization.is_ternary:
            model = lower(model, WeightFormat(1.58, "2bit", 8))
            shipped = QuantizationConfig(1.58, 8, 8)
            model.config = dataclasses.replace(model.config, quantization=shipped)
        elif self.base.keeps_start and self.start is not None:
            restore_dtypes(model, stored_dtypes(self.start), self._trained_names(index))
        if self.base.keeps_start and self.start is not None:
            restore_packed(model, self.start, self._trained_names(index), self.decoder_from)
        model.directory = None
        runs = recorded_runs(self.out, (stage.name for stage in self.recipe.stages))
        recorded = read_description(self.out) or {}
        provenance = {
            **{key: value for key, value in recorded.items() if key not in ("preset", "resolved")},
            "recipe": self.recipe.to_dict(),
            "torch": torch.__version__,
            "runs": runs,
        }

        heads = self.out / self.recipe.stages[index].name / HEADS

        def complete(folder: Path) -> None:
            if heads.is_file():
                shutil.copyfile(heads, folder / HEADS)
            self.base.save_processor(model.config, folder)
            (folder / "training.json").write_text(json.dumps(provenance, indent=2) + "\n")

        save_checkpoint(model, target, complete)

    def _trained_names(self, last: int) -> set[str]:
        """Names of the parameters that the stages up to `last` have trained."""
        names: set[str] = set()
        for stage in self.recipe.stages[self.skipped : last + 1]:
            stored = read_weights_header(self.out / stage.name / WEIGHTS).tensors
            names |= {name.removeprefix("model.") for name in stored}
        return names

    def load_stage(self, index: int, weights: Path) -> MicroVLM:
        """The model that a stage has stored in a file, with what it did not train from the run's start."""
        model = MicroVLM(self.config(index))
        tensors, _ = read_tensors(weights)
        own = {
            key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")
        }
        tensors = own or tensors
        if set(tensors) != set(model.state_dict()):
            if index > self.skipped:
                before = self.out / self.recipe.stages[index - 1].name / WEIGHTS
                earlier = self.load_stage(index - 1, before).state_dict()
                tensors = model.state_dict() | earlier | tensors
            elif self.start is not None:
                self._load_start(model, index)
                tensors = model.state_dict() | tensors
        load_strictly(model, tensors, str(weights))
        return model.eval()

    def _context(self, workers: int, trackers: Sequence[str]) -> RunContext:
        options = accelerator_options(trackers if self.processes.is_main else (), self.out)
        accelerator = build_accelerator(self.processes, options)
        name = self.processes.on_main(self._run_name)
        tracking = Tracking(accelerator, self.out, name, self._describe(None))
        total = sum(stage.steps for stage in self.recipe.stages[self.skipped :])
        return RunContext(
            self.out, self.log, accelerator, tracking, total, workers=workers, processes=self.processes
        )

    def _run_name(self) -> str:
        """The run's name in the trackers, kept in its folder."""
        path = self.out / RUN
        if path.is_file():
            return documents.load(path, dict[str, Any], "delete it").get("name", self.out.name)
        now = datetime.now()
        name = (
            self.out.name
            if self.out.name.startswith("run_")
            else next_run_name(self.out.parent, self.recipe.name, now)
        )
        document = {"name": name, "recipe": self.recipe.name, "began": now.isoformat(timespec="seconds")}
        write_file(path, json.dumps(document, indent=2) + "\n")
        return name

    def _describe(self, budget: Budget | None) -> dict[str, Any]:
        """What decides a run's result, as JSON."""
        run: dict[str, Any] = {"recipe": self.recipe.to_dict(), "float_control": self.float_control}
        if self.given_start and self.start is not None:
            begun = {"weights_sha256": weights_sha256(self.start), "stage": self.start_stage}
            if self.decoder_from is not None:
                begun["decoder_sha256"] = weights_sha256(self.decoder_from)
            run |= {"start": begun | ({"fresh": sorted(self.fresh)} if self.fresh else {})}
        described = self.classes[0].describe_data(self.data)
        if described is not None:
            run["data"] = described
        if budget is not None:
            run["budget"] = dataclasses.asdict(budget)
        if self.base_bits != FLOAT_BITS:
            run["base_bits"] = self.base_bits
        plain: dict[str, Any] = json.loads(json.dumps({**run, "preset": self.base.config.to_dict()}))
        return plain

    def _check_trained(self) -> None:
        """Raises UserError for a name of something to train that the model has not, before a folder is claimed."""
        for index, stage in enumerate(self.recipe.stages):
            if issubclass(self.classes[index], WholeModelTask) and self.classes[index].keeps_frozen_parts_out:
                relative_rates(weight_shapes(self.config(index)), stage.caption.trained)

    def _check_fresh(self) -> None:
        with torch.device("meta"):
            parts = dict.fromkeys(name.split(".")[0] for name in MicroVLM(self.base.config).state_dict())
        for stage in self.recipe.stages:
            unknown = [part for part in stage.fresh if part not in parts]
            if unknown:
                raise UserError(
                    f"stage '{stage.name}': the model has no part {quote(unknown[0])} to begin anew; it has "
                    f"{', '.join(parts)}."
                )


def stage_config(
    base: MicroVLMConfig, stages: Sequence[StageConfig], float_control: bool, keeps_ternary: bool = False
) -> MicroVLMConfig:
    """The configuration in the last of `stages`; vision is trained in float32 and rounded at the end.

    A decoder that becomes ternary gets SubLN. keeps_ternary : the run starts from a ternary model, which stays one.
    """
    ternary = (stages[-1].decoder_bits == 1.58 or keeps_ternary) and not float_control
    widths = QuantizationConfig(1.58 if ternary else 32, 32, 8 if ternary else 32)
    text = base.text
    if any(stage.decoder_bits == 1.58 for stage in stages) and not float_control:
        rotation = next((stage.rotation for stage in stages if stage.rotation), text.rotation)
        if rotation and text.hidden_size % rotation:
            raise UserError(
                f"a rotation of {rotation} does not divide the decoder's width of {text.hidden_size}: set the "
                "`rotation` of the recipe's stages to 16, or to 0 for none."
            )
        text = dataclasses.replace(text, sub_norm=True, rotation=rotation)
    return dataclasses.replace(base, quantization=widths, text=text)


__all__ = ["BEST_CHECKPOINT", "CHECKPOINT", "TrainingRun", "open_data", "preset", "stage_config", "train"]
