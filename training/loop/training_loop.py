"""The training loop: steps, metrics, evaluation, resumable states. Knows no particular stage.

A batch is a function of (seed, stage, step) alone, so a resumed run trains on the batches of an unbroken one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from microvlm.atomic import new_file, write_file
from microvlm.errors import UserError
from microvlm.model.checkpoint import write_tensors
from microvlm.training.loop.loss_guard import LossGuard
from microvlm.training.loop.optimizers import usable_precision
from microvlm.training.loop.processes import own_error
from microvlm.training.loop.run_context import RunContext, cut_evaluations, write_status
from microvlm.training.loop.run_files import BEST, CURVES, DEVICES, EVALUATIONS, METRICS, PICTURES
from microvlm.training.loop.run_provenance import record_run
from microvlm.training.loop.run_state import changing_tensors, load_state, save_state
from microvlm.training.loop.run_summary import read_evaluations
from microvlm.training.loop.sharding import whole_tensors
from microvlm.training.loop.stage_trainer import StageTrainer
from microvlm.training.loop.step_metrics import StepMemory, StepMetrics
from microvlm.training.loop.stop_request import StopRequest
from microvlm.training.recipe import Recipe
from microvlm.training.stages.task import Task
from microvlm.training.watching import names
from microvlm.training.watching.plots import curves
from microvlm.training.watching.progress import Progress

SHOWN = {
    names.EVALUATION_LOSS: "caption loss",
    names.EVALUATION_KL: "KL from the teacher",
    names.EVALUATION_TEXT_LOSS: "cross-entropy of the texts",
    "evaluation/token_accuracy": "next token right",
    "evaluation/alignment_recall_at_1": "own caption nearest",
    "evaluation/text_perplexity": "perplexity of the text",
}
"""Metrics of an evaluation that the console shows; evaluations.jsonl has all."""
PARTS_OF_A_STAGE = 5
"""Evaluations and sets of pictures of a stage whose recipe does not say after how many steps."""
_STATUS_SECONDS = 2.0
_SAME_REQUEST_SECONDS = 2.0
"""A terminal's Ctrl-C reaches every process, and the launcher passes it on once more."""


class StageRun:
    """One stage on its way: its trainer, its files and its clocks."""

    def __init__(self, task: Task, recipe: Recipe, index: int, context: RunContext):
        self.task, self.recipe, self.index, self.context = task, recipe, index, context
        self.stage = recipe.stages[index]
        self.folder = context.folder / self.stage.name
        precision = usable_precision(self.stage.mixed_precision or recipe.mixed_precision, context.log)
        self.processes = context.processes
        self.trainer = StageTrainer(task, self.stage, precision, context.accelerator, self.processes)
        self.best: dict[str, float] = {}
        self.is_main = self.processes.is_main
        parts = max(1, math.ceil(self.stage.steps / PARTS_OF_A_STAGE))
        self.evaluate_every = recipe.evaluate_every or parts
        self.picture_every = recipe.picture_every or parts
        self._status_written = 0.0
        self.last_step = 0
        is_last = index == len(recipe.stages) - 1
        self.target = context.target if is_last else None

    def resume(self) -> int:
        """Load the stage's newest state; returns the number of steps that are done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer = self.trainer
        state = load_state(self.folder, self.task.module, trainer.optimizers, trainer.schedulers)
        step = 0 if state is None else state.step
        if step > self.stage.steps:
            raise UserError(
                f"{self.folder} is of {step} steps and the stage has {self.stage.steps}: delete {self.folder}."
            )
        self.best = {} if state is None else dict(state.best)
        if self.is_main:
            self.context.tracking.rewind(
                self.context.first_step + step if step or self.context.first_step else -1
            )
            cut_evaluations(
                self.context.folder / EVALUATIONS, self.context.first_step + step, self.stage.name, step
            )
            record_run(self.folder, step, trainer.precision, trainer.optimizer_names)
        return step

    def log_sizes(self) -> None:
        """Log how many parameters the model has, how many learn, and its bytes."""
        module = self.task.module
        parameters = list(module.parameters())
        values = {
            names.TRAINABLE_PARAMS: sum(p.numel() for p in parameters if p.requires_grad),
            names.TOTAL_PARAMS: sum(p.numel() for p in parameters),
            names.MODEL_MEMORY: sum(t.nbytes for t in (*parameters, *module.buffers())),
        }
        if self.is_main:
            self.context.tracking.log(self.context.first_step, values)

    def save(self, step: int) -> None:
        """Write the state after `step`; every process must call this."""
        save_state(
            self.folder,
            step,
            self.task.module,
            self.trainer.optimizers,
            self.task.memory(),
            self.best,
            self.recipe.keep_states,
            self.processes,
        )

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate the task, record the values, and keep the weights if they are the stage's best.

        Every process must call this; the main one evaluates.
        """
        context, began = self.context, time.perf_counter()
        with self.whole_module() as module:
            if module is None:
                return {}
            with torch.no_grad(), self.trainer.precise():
                values = self.task.evaluate(context.folder, context.first_step + step)
            seconds = round(time.perf_counter() - began, 3)
            if context.target is not None and self.stage.task == self.recipe.stages[-1].task:
                context.target.require(values)
            if values:
                self._record(step, values, seconds, module)
        return values

    @contextmanager
    def whole_module(self) -> Iterator[nn.Module | None]:
        """The task's module on the main process, None on the others. Of a sharded one, a copy with whole weights."""
        if not self.processes.shards:
            yield self.task.module if self.is_main else None
            return
        tensors = whole_tensors(self.task.module.state_dict(), self.processes)
        if not self.is_main:
            yield None
            return
        device = self.trainer.device
        with self.task.evaluated_on({name: t.to(device) for name, t in tensors.items()}) as copy:
            learning = {name for name, p in self.task.module.named_parameters() if p.requires_grad}
            for name, parameter in copy.named_parameters():
                parameter.requires_grad_(name in learning)
            yield copy

    def _record(self, step: int, values: dict[str, float], seconds: float, module: nn.Module) -> None:
        context = self.context
        row = {"stage": self.stage.name, "stage_step": step, "step": context.first_step + step, **values}
        row["seconds"] = seconds
        with (context.folder / EVALUATIONS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        context.tracking.log(context.first_step + step, values)
        # The loss of a stage on text is one of the two that have names of their own.
        left_out = {names.EVALUATION_LOSS} if names.EVALUATION_TEXT_LOSS in values else set()
        shown = "  ".join(
            f"{words} {values[key]:.4g}" for key, words in SHOWN.items() if key in values.keys() - left_out
        )
        context.log(f"{self.stage.name} {step}/{self.stage.steps}  held out: {shown}")
        loss = values.get(names.EVALUATION_LOSS)
        if step and loss is not None and loss < self.best.get("loss", float("inf")):
            self.best = {"loss": loss, "step": step}
            self._keep_best(module)

    def _keep_best(self, module: nn.Module) -> None:
        """Write what the stage trains, or all of a model that was trained from its beginning."""
        tensors = changing_tensors(module)
        if not self.task.keeps_frozen_parts_out:
            tensors = self.task.result().state_dict()
        with new_file(self.folder / BEST) as temporary:
            write_tensors(tensors, temporary)

    def draw_pictures(self, step: int, batch: Any) -> None:
        """Draw the task's heatmaps of this batch, and hand them to the trackers; every process must call this."""
        folder = self.context.folder / PICTURES
        number = self.context.first_step + step
        with self.whole_module() as module, torch.no_grad(), self.trainer.precise():
            if module is None:
                return
            folder.mkdir(exist_ok=True)
            pictures, values = self.task.draw_pictures(module, batch, folder, number)
        if values:
            self.context.tracking.log(number, values)
        if curves(self.context.folder / METRICS, self.context.folder / CURVES):
            pictures["curves"] = self.context.folder / CURVES
        for name, path in pictures.items():
            self.context.tracking.picture(number, name, path)

    def write_status(self, state: str, step: int, reason: str = "") -> None:
        """Write the run's status.json, which `microvlm-train watch` reads; at most every two seconds while it runs."""
        now = time.time()
        if not self.is_main or (state == "running" and now - self._status_written < _STATUS_SECONDS):
            return
        self._status_written = now
        place = {"stage": self.stage.name, "stage_step": step, "stage_steps": self.stage.steps}
        write_status(self.context, state, self.context.first_step + step, reason, place)

    def train(self, start: int, stop_after: int | None) -> bool:
        """Take the steps after `start`. Returns whether the stage is complete."""
        stage, context, trainer = self.stage, self.context, self.trainer
        memory = StepMemory(trainer.device)
        guard = LossGuard(context.folder, stage.name, self.is_main)
        means = StepMetrics(self.recipe.log_every)
        stop = StopRequest(context.log, _SAME_REQUEST_SECONDS if self.processes.count > 1 else 0.0)
        batches = trainer.batches(self.recipe.seed, self.index, start, context.workers)
        step, reached = start, False
        progress = (
            Progress(stage.steps, start, every=self.recipe.log_every, name=stage.name, log=context.log)
            if self.is_main
            else None
        )
        with stop, progress or nullcontext():
            began = time.perf_counter()
            for step, batch in enumerate(batches, start + 1):
                self.processes.raise_together(batch if isinstance(batch, UserError) else None)
                with memory.step():
                    metrics = trainer.step(batch)
                loss = float(metrics["loss"].detach())
                guard.check(step, loss, float(metrics["gradient_norm"]), self.task.keys(batch))
                self.last_step = step
                samples, tokens = self.task.size(batch)
                means.add(metrics, samples, tokens, time.perf_counter() - began)
                if progress is not None:
                    answers = metrics.get(names.LM_LOSS, metrics["loss"])
                    progress.update(step, float(answers.detach()), samples, tokens)
                if (step % self.recipe.log_every == 0 or step == stage.steps) and self.is_main:
                    self._log(step, means.take())
                stopping = self.processes.any(stop.requested) or (
                    stop_after is not None and step - start >= stop_after
                )
                if step % self.picture_every == 0 or step == stage.steps:
                    self.draw_pictures(step, batch)
                if step % self.evaluate_every == 0 or step == stage.steps:
                    values = self.evaluate(step)
                    reached = self.target is not None and self.target.is_met(values)
                if reached and means.count and self.is_main:
                    self._log(step, means.take())
                if step % self.recipe.save_every == 0 or step == stage.steps or stopping or reached:
                    self.save(step)
                self.write_status("running", step)
                if reached or (stopping and step < stage.steps):
                    break
                began = time.perf_counter()
        self._write_devices(memory)
        # Asked again: a request may come while the last step is evaluated and saved.
        if self.processes.any(stop.requested):
            context.log(f"stopped after step {step} of {stage.name}, which is saved")
            raise KeyboardInterrupt
        if reached:
            context.log(f"{stage.name} {step}/{stage.steps}  reached {self.target}")
        elif step < stage.steps:
            self.write_status("stopped", step, "--stop-after")
            return False
        return True

    def has_reached(self) -> bool:
        """Whether an evaluation of this stage, from before it was resumed, reached the score that ends the run."""
        if self.target is None:
            return False
        rows = [row for row in read_evaluations(self.context.folder) if row["stage"] == self.stage.name]
        return any(row["stage_step"] > 0 and self.target.is_met(row) for row in rows)

    def _write_devices(self, memory: StepMemory) -> None:
        """Write how the stage was trained since it was begun or resumed; every process must call this."""
        peaks = self.processes.gather(memory.peak_bytes)
        if not self.is_main:
            return
        document = {
            "processes": self.processes.count,
            "sharding": self.processes.sharding,
            "device": self.trainer.device.type,
            "step_peak_bytes": [peak for peak in peaks if peak is not None],
        }
        write_file(self.folder / DEVICES, json.dumps(document) + "\n")

    def _log(self, step: int, row: dict[str, float]) -> None:
        rates = self.trainer.rates()
        number = self.context.first_step + step
        row |= {names.LEARNING_RATE: rates[0], names.STAGE_STEP: step}
        row |= {f"train/learning_rate_{i}": rate for i, rate in enumerate(rates[1:], 1)}
        self.context.tracking.log(number, row)


def run_stage(
    task: Task, recipe: Recipe, index: int, context: RunContext, stop_after: int | None = None
) -> bool:
    """Train stage `index`, resuming from the newest state in its folder. Returns whether the stage is complete.

    stop_after : save the state and return after this many steps of this call. Raises UserError for a loss that is no
    number or jumps, KeyboardInterrupt after an interrupt, with the step's state saved.
    """
    run = StageRun(task, recipe, index, context)
    stage = run.stage
    start = run.resume()
    context.log(f"{stage.name}: {stage.steps} steps" + (f", of which {start} are done" if start else ""))
    try:
        with run.trainer.precise():
            task.prepare()
        run.write_status("running", start)
        if start == 0:
            run.log_sizes()
            if type(task).evaluate is not Task.evaluate:
                context.log(f"{stage.name}: evaluating before the first step")
            run.evaluate(0)
        is_done = start == stage.steps or (start > 0 and run.has_reached())
        complete = True if is_done else run.train(start, stop_after)
    except (torch.OutOfMemoryError, MemoryError):
        run.write_status("failed", start, "out of memory")
        raise own_error(
            context.processes,
            f"stage '{stage.name}' needs more memory than there is: give a smaller --batch-size, or --base-bits 4; the "
            "last saved state stays.",
        ) from None
    except UserError as error:
        run.write_status("failed", start, str(error))
        raise
    except KeyboardInterrupt:
        run.write_status("stopped", run.last_step, "interrupted")
        raise
    except Exception as error:  # a defect: its traceback follows
        run.write_status("failed", run.last_step, type(error).__name__)
        raise
    finally:
        run.trainer.release()
    return complete
