"""The training loop: Accelerate, metrics, evaluation, resumable states. Knows no particular stage.

A batch is a function of (seed, stage, step) alone, so a resumed run trains on the batches of an unbroken one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from microvlm.atomic import new_file, write_file
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.model.checkpoint import write_tensors
from microvlm.model.linear import weights_rounded_once
from microvlm.training.loop.loss_guard import LossGuard
from microvlm.training.loop.optimizers import build_optimizers, cosine, usable_precision
from microvlm.training.loop.run_files import BEST, CURVES, EVALUATIONS, METRICS, PICTURES, STATUS
from microvlm.training.loop.run_provenance import record_run
from microvlm.training.loop.run_state import changing_tensors, load_state, save_state
from microvlm.training.recipe import Recipe, StageConfig
from microvlm.training.stages.task import Task
from microvlm.training.watching import names
from microvlm.training.watching.plots import curves
from microvlm.training.watching.progress import Progress
from microvlm.training.watching.tracking import Tracking

PARTS_OF_A_STAGE = 5
"""Evaluations and sets of pictures of a stage whose recipe does not say after how many steps."""
_STATUS_SECONDS = 2.0


@dataclass
class RunContext:
    """What all stages of a run share."""

    folder: Path
    log: Callable[[str], None]
    accelerator: Accelerator
    tracking: Tracking
    total_steps: int
    """Of all stages of this run."""
    first_step: int = 0
    """Steps of the stages before this one."""
    workers: int = 0


def write_status(
    context: RunContext, state: str, step: int, reason: str = "", place: Mapping[str, Any] | None = None
) -> None:
    """Write a run's status.json: its state, the step over all stages, and why it ended."""
    document = {
        "state": state,
        **(place or {}),
        "step": step,
        "steps": context.total_steps,
        "reason": reason,
        "updated": round(time.time(), 1),
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }
    write_file(context.folder / STATUS, json.dumps(document) + "\n")


class StageBatches(Dataset):
    """The batches of a stage, indexed by step."""

    def __init__(self, task: Task, seed: int, stage: int, process: int):
        self.task, self.seed, self.stage, self.process = task, seed, stage, process

    def __getitem__(self, step: int) -> Any:
        """The batch of a step, or the UserError that drawing it raised, which a worker would pack into another one."""
        try:
            return self.task.draw_step(step, step_generator(self.seed, self.stage, step, self.process))
        except UserError as error:
            return error


def step_generator(seed: int, stage: int, step: int, process: int) -> torch.Generator:
    """The generator that the batch of this step is drawn with. Part of the recipes' reproducibility."""
    return torch.Generator().manual_seed(((seed * 101 + stage) * 1_000_003 + step) * 257 + process)


class StageTrainer:
    """A stage's module with its optimisers and schedules, on the accelerator."""

    def __init__(self, task: Task, stage: StageConfig, precision: str, accelerator: Accelerator):
        self.task, self.stage, self.precision = task, stage, precision
        self.accelerator, self.device = accelerator, accelerator.device
        optimizers = build_optimizers(task, stage, self.device)
        self.optimizer_names = [type(optimizer).__name__ for optimizer in optimizers]
        self.optimizers = [accelerator.prepare(optimizer) for optimizer in optimizers]
        self.schedulers = [
            accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(stage)))
            for optimizer in self.optimizers
        ]
        self.module = accelerator.prepare(task.module)

    @contextmanager
    def precise(self) -> Iterator[None]:
        """The stage's precision; within it every latent weight is rounded once."""
        bfloat16 = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with bfloat16, weights_rounded_once():
            yield

    def step(self, batch: Any) -> dict[str, Any]:
        """Take one optimiser step; returns the loss, the gradient norm and the task's metrics."""
        with self.precise():
            loss, metrics = self.task.loss(self.module, batch)
        self.accelerator.backward(loss)
        learning = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        norm = self.accelerator.clip_grad_norm_(learning, self.stage.max_grad_norm)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        return {"loss": loss, "gradient_norm": norm, **metrics}

    def rates(self) -> list[float]:
        """The learning rates of all groups, of AdamW first."""
        return [rate for scheduler in self.schedulers for rate in scheduler.get_last_lr()]

    def batches(self, seed: int, index: int, start: int, workers: int) -> DataLoader:
        """The batches from step `start` on, drawn by `workers` processes ahead of the steps."""
        return DataLoader(
            StageBatches(self.task, seed, index, self.accelerator.process_index),
            batch_size=None,
            collate_fn=_unchanged,
            sampler=range(start, self.stage.steps),
            num_workers=workers,
            # Its own generator: a loader draws its workers' seed, which would advance torch's in a resumed run twice.
            generator=torch.Generator(),
            pin_memory=self.device.type == "cuda",
            multiprocessing_context="fork" if workers else None,
        )

    def release(self) -> None:
        """Forget the stage's module and optimisers, so that the next stage's do not add to them."""
        self.accelerator.free_memory()


class StepMetrics:
    """Averages the metrics of `every` steps."""

    def __init__(self, every: int):
        self.every, self.count = every, 0
        # Sums stay on the device: fetching a number each step would make the device wait.
        self.sums: dict[str, Tensor] = {}
        self.samples = self.tokens = 0
        self.seconds = 0.0

    def add(self, metrics: dict[str, Any], samples: int, tokens: int, seconds: float) -> None:
        """Add a step's metrics. seconds : of waiting for its batch and of the step, without evaluations and pictures."""
        for key, value in metrics.items():
            self.sums[key] = self.sums.get(key, 0.0) + torch.as_tensor(value).detach()
        self.count += 1
        self.samples += samples
        self.tokens += tokens
        self.seconds += seconds

    def take(self) -> dict[str, float]:
        """The means since the last call, and the rates of samples and tokens."""
        seconds = max(1e-9, self.seconds)
        row = {_metric_name(key): round(float(value) / self.count, 6) for key, value in self.sums.items()}
        row |= {
            "train/step_s": round(seconds / self.count, 4),
            names.SAMPLES_PER_SECOND: round(self.samples / seconds, 3),
            names.TOKENS_PER_SECOND: round(self.tokens / seconds, 2),
        }
        self.sums, self.count, self.samples, self.tokens, self.seconds = {}, 0, 0, 0, 0.0
        return row


class StageRun:
    """One stage on its way: its trainer, its files and its clocks."""

    def __init__(self, task: Task, recipe: Recipe, index: int, context: RunContext):
        self.task, self.recipe, self.index, self.context = task, recipe, index, context
        self.stage = recipe.stages[index]
        self.folder = context.folder / self.stage.name
        precision = usable_precision(self.stage.mixed_precision or recipe.mixed_precision, context.log)
        self.trainer = StageTrainer(task, self.stage, precision, context.accelerator)
        self.best: dict[str, float] = {}
        self.is_main = context.accelerator.is_main_process
        parts = max(1, self.stage.steps // PARTS_OF_A_STAGE)
        self.evaluate_every = recipe.evaluate_every or parts
        self.picture_every = recipe.picture_every or parts
        self._status_written = 0.0
        self.last_step = 0

    def resume(self) -> int:
        """Load the stage's newest state; returns the number of steps that are done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer = self.trainer
        state = load_state(self.folder, _bare(trainer), trainer.optimizers, trainer.schedulers)
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
            _cut_evaluations(
                self.context.folder / EVALUATIONS, self.context.first_step + step, self.stage.name, step
            )
            record_run(self.folder, step, trainer.precision, trainer.optimizer_names)
        return step

    def log_sizes(self) -> None:
        """Log how many parameters the model has, how many learn, and its bytes."""
        module = _bare(self.trainer)
        parameters = list(module.parameters())
        values = {
            names.TRAINABLE_PARAMS: sum(p.numel() for p in parameters if p.requires_grad),
            names.TOTAL_PARAMS: sum(p.numel() for p in parameters),
            names.MODEL_MEMORY: sum(t.nbytes for t in (*parameters, *module.buffers())),
        }
        if self.is_main:
            self.context.tracking.log(self.context.first_step, values)

    def save(self, step: int) -> None:
        if self.is_main:
            trainer = self.trainer
            memory = self.task.memory()
            save_state(
                self.folder,
                step,
                _bare(trainer),
                trainer.optimizers,
                memory,
                self.best,
                self.recipe.keep_states,
            )

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate the task, record the values, and keep the weights if they are the stage's best."""
        if not self.is_main:
            return {}
        with torch.no_grad(), self.trainer.precise():
            values = self.task.evaluate(self.context.folder, self.context.first_step + step)
        if not values:
            return {}
        context = self.context
        row = {"stage": self.stage.name, "stage_step": step, "step": context.first_step + step, **values}
        with (context.folder / EVALUATIONS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        context.tracking.log(context.first_step + step, values)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        context.log(f"{self.stage.name} {step}/{self.stage.steps}  {shown}")
        loss = values.get(names.EVALUATION_LOSS)
        if step and loss is not None and loss < self.best.get("loss", float("inf")):
            self.best = {"loss": loss, "step": step}
            self._keep_best()
        return values

    def _keep_best(self) -> None:
        with new_file(self.folder / BEST) as temporary:
            write_tensors(changing_tensors(_bare(self.trainer)), temporary)

    def draw_pictures(self, step: int, batch: Any) -> None:
        """Draw the task's heatmaps of this batch, and hand them to the trackers."""
        if not self.is_main:
            return
        folder = self.context.folder / PICTURES
        folder.mkdir(exist_ok=True)
        number = self.context.first_step + step
        with torch.no_grad(), self.trainer.precise():
            pictures, values = self.task.draw_pictures(_bare(self.trainer), batch, folder, number)
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
        guard = LossGuard(context.folder, stage.name)
        means = StepMetrics(self.recipe.log_every)
        stop = StopRequest(context.log)
        batches = trainer.batches(self.recipe.seed, self.index, start, context.workers)
        step = start
        progress = (
            Progress(stage.steps, start, every=self.recipe.log_every, name=stage.name, log=context.log)
            if self.is_main
            else None
        )
        with stop, progress or nullcontext():
            began = time.perf_counter()
            for step, batch in enumerate(batches, start + 1):
                if isinstance(batch, UserError):
                    raise batch
                metrics = trainer.step(batch)
                loss = float(metrics["loss"].detach())
                guard.check(step, loss, float(metrics["gradient_norm"]), self.task.keys(batch))
                self.last_step = step
                samples, tokens = self.task.size(batch)
                means.add(metrics, samples, tokens, time.perf_counter() - began)
                if progress is not None:
                    progress.update(step, loss, samples, tokens)
                if (step % self.recipe.log_every == 0 or step == stage.steps) and self.is_main:
                    self._log(step, means.take())
                stopping = stop.requested or (stop_after is not None and step - start >= stop_after)
                if step % self.picture_every == 0 or step == stage.steps:
                    self.draw_pictures(step, batch)
                if step % self.evaluate_every == 0 or step == stage.steps:
                    self.evaluate(step)
                if step % self.recipe.save_every == 0 or step == stage.steps or stopping:
                    self.save(step)
                self.write_status("running", step)
                if stopping and step < stage.steps:
                    break
                began = time.perf_counter()
        if stop.requested:
            context.log(f"stopped after step {step} of {stage.name}, which is saved")
            raise KeyboardInterrupt
        if step < stage.steps:
            self.write_status("stopped", step, "--stop-after")
            return False
        return True

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
        if start == 0:
            run.log_sizes()
            run.evaluate(0)
        complete = run.train(start, stop_after) if start < stage.steps else True
    except (torch.OutOfMemoryError, MemoryError):
        run.write_status("failed", start, "out of memory")
        raise UserError(
            f"stage '{stage.name}' needs more memory than there is: give a smaller --batch-size, or --base-bits 4; the "
            "last saved state stays."
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


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag, so that a step ends and is saved; the second ends at once."""

    def __init__(self, log: Callable[[str], None]):
        self.log, self.requested = log, False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.log("stopping after this step; once more to stop at once, without saving it")


def _bare(trainer: StageTrainer) -> Any:
    return trainer.accelerator.unwrap_model(trainer.module)


def _unchanged(batch: Any) -> Any:
    """Replaces the loader's own conversion, which would turn arrays into tensors."""
    return batch


def _metric_name(key: str) -> str:
    return key if "/" in key else f"train/{key}"


def _cut_evaluations(path: Path, step: int, stage: str, done: int) -> None:
    """Drop the evaluations after `step`, which a resumed run makes again, and the first of a stage with `done` 0 steps."""
    try:
        lines = documents.read_file(path).splitlines(keepends=True)
    except FileNotFoundError:
        return
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if done == 0:
        kept = [line for line in kept if json.loads(line).get("stage") != stage]
    if len(kept) < len(lines):
        write_file(path, b"".join(kept).decode())


def _step_of(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**60
