"""The training loop: optimisers, learning rates, Accelerate, JSONL log, resumable state. Knows no particular stage.

A batch is a function of (seed, stage, step) alone, so a resumed run trains on the batches of an unbroken one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from accelerate import Accelerator
from msgspec import Meta
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from microvlm.atomic import write_file
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Count
from microvlm.model.linear import weights_rounded_once
from microvlm.training.muon import Float32Muon
from microvlm.training.recipe import Recipe, StageConfig
from microvlm.training.run_provenance import record_run
from microvlm.training.stages.task import Task


class StageBatches(Dataset):
    """The batches of a stage, indexed by step."""

    def __init__(self, task: Task, seed: int, stage: int, process: int):
        self.task, self.seed, self.stage, self.process = task, seed, stage, process

    def __getitem__(self, step: int) -> Any:
        return self.task.draw(step_generator(self.seed, self.stage, step, self.process))


def build_optimizers(task: Task, stage: StageConfig, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW for vectors, embeddings and heads; Muon for the blocks' matrices if the stage has a `muon_factor`.

    Muon orthogonalises each update (Jordan et al. 2024). Its rate is scaled to the size of AdamW's updates (Liu et al.
    2025, arXiv 2502.16982), so that one schedule and one weight decay serve both.
    """
    blocks = {
        id(p)
        for name, p in task.module.named_parameters()
        if name.endswith(".weight") and p.ndim == 2 and ("layers." in name or "adapter." in name)
    }
    muon, adam = [], []
    for group in task.parameter_groups():
        hidden = [p for p in group["params"] if stage.muon_factor > 0 and id(p) in blocks]
        hidden_ids = {id(p) for p in hidden}
        rest = [p for p in group["params"] if id(p) not in hidden_ids]
        muon += [{"params": hidden, "lr": stage.muon_factor * group["lr"]}] if hidden else []
        adam += [{"params": rest, "lr": group["lr"]}] if rest else []
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(adam, weight_decay=stage.weight_decay, betas=(0.9, 0.98))
    ]
    if muon and device.type == "cpu" and has_bfloat16():
        optimizers.append(
            torch.optim.Muon(muon, weight_decay=stage.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    elif muon:
        optimizers.append(Float32Muon(muon, weight_decay=stage.weight_decay))
    return optimizers


def cosine(stage: StageConfig) -> Callable[[int], float]:
    """Factor of the learning rate at each step: linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(stage.steps * stage.warmup_fraction))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, stage.steps - warmup)))

    return factor


def step_generator(seed: int, stage: int, step: int, process: int) -> torch.Generator:
    """The generator that the batch of this step is drawn with. Part of the recipes' reproducibility."""
    return torch.Generator().manual_seed(((seed * 101 + stage) * 1_000_003 + step) * 257 + process)


STATES = ("state0", "state1")
PROGRESS = "progress.json"


def has_bfloat16() -> bool:
    """Whether this machine has bfloat16 arithmetic; emulating it was measured 200 times slower than float32."""
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def usable_precision(precision: str, log: Callable[[str], None]) -> str:
    """`precision`, or `no` if it is bf16 and this machine would emulate that."""
    if precision == "bf16" and not has_bfloat16():
        log("this CPU has no bfloat16 arithmetic: training in float32")
        return "no"
    return precision


class StageTrainer:
    """A stage's module with its optimisers and schedules, on the accelerator."""

    def __init__(self, task: Task, stage: StageConfig, precision: str):
        self.task, self.stage, self.precision = task, stage, precision
        # Autocast is entered in `precise`: an Accelerator's own cannot change from one stage of a process to the next.
        self.accelerator = Accelerator(mixed_precision="no")
        self.device = self.accelerator.device
        optimizers = build_optimizers(task, stage, self.device)
        self.optimizer_names = [type(optimizer).__name__ for optimizer in optimizers]
        self.optimizers = [self.accelerator.prepare(optimizer) for optimizer in optimizers]
        self.schedulers = [
            self.accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(stage)))
            for optimizer in self.optimizers
        ]
        self.module = self.accelerator.prepare(task.module)

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
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.stage.max_grad_norm)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        return {"loss": loss, "grad_norm": norm, **metrics}

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


class StepLog:
    """Averages the metrics of `every` steps into a line of `path` and of the console."""

    def __init__(self, path: Path, stage: StageConfig, every: int, log: Callable[[str], None]):
        self.path, self.stage, self.every, self.log = path, stage, every, log
        # Sums stay on the device: fetching a number each step would make the device wait.
        self.sums: dict[str, Tensor] = {}
        self.began = time.perf_counter()

    def add(self, step: int, metrics: dict[str, Any], rate: Callable[[], float]) -> None:
        """Add the metrics of step `step`, counted from 1. `rate` gives the learning rate."""
        for key, value in metrics.items():
            self.sums[key] = self.sums.get(key, 0.0) + torch.as_tensor(value).detach()
        if step % self.every == 0:
            self._write(step, rate())

    def _write(self, step: int, rate: float) -> None:
        seconds = (time.perf_counter() - self.began) / self.every
        row: dict[str, Any] = {key: round(float(value) / self.every, 5) for key, value in self.sums.items()}
        row |= {"stage": self.stage.name, "step": step, "lr": rate, "step_s": round(seconds, 4)}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        values = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in ("stage", "step"))
        self.log(f"{self.stage.name} {step}/{self.stage.steps}  {values}")
        self.sums, self.began = {}, time.perf_counter()


def run_stage(
    task: Task,
    recipe: Recipe,
    index: int,
    folder: Path,
    log: Callable[[str], None],
    stop_after: int | None = None,
    workers: int = 0,
) -> bool:
    """Train stage `index`, resuming from the state in `folder` if there is one. Returns whether the stage is complete.

    stop_after : save the state and return after this many steps of this call. workers : processes that draw batches
    ahead; they do not change what is drawn.
    """
    stage = recipe.stages[index]
    precision = usable_precision(stage.mixed_precision or recipe.mixed_precision, log)
    trainer = StageTrainer(task, stage, precision)
    accelerator = trainer.accelerator
    start = _resume(accelerator, folder, stage.steps)
    log(f"{stage.name}: {stage.steps} steps" + (f", of which {start} are done" if start else ""))
    if accelerator.is_main_process:
        record_run(folder, start, precision, trainer.optimizer_names)
    with trainer.precise():
        task.prepare()
    steps = StepLog(folder / "log.jsonl", stage, recipe.log_every, log)
    for step, batch in enumerate(trainer.batches(recipe.seed, index, start, workers), start + 1):
        metrics = trainer.step(batch)
        if accelerator.is_main_process:
            steps.add(step, metrics, lambda: trainer.schedulers[0].get_last_lr()[0])
        stopping = stop_after is not None and step - start >= stop_after
        if step % recipe.save_every == 0 or step == stage.steps or stopping:
            _save(accelerator, folder, step)
        if stopping and step < stage.steps:
            return False
    return True


def _unchanged(batch: Any) -> Any:
    """Replaces the loader's own conversion, which would turn arrays into tensors."""
    return batch


def _save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Save into the state folder that does not hold the last complete state, then record it; a crash leaves one."""
    saved = _progress(folder)
    name = STATES[saved is not None and saved.state == STATES[0]]
    accelerator.save_state(str(folder / name))
    if accelerator.is_main_process:
        write_file(folder / PROGRESS, json.dumps({"state": name, "step": step}))


class Progress(msgspec.Struct, frozen=True):
    """A stage's last complete state: its folder, one of STATES, and the number of steps that are done."""

    state: Annotated[str, Meta(pattern=r"^state[01]\Z")]
    step: Count


def _progress(folder: Path) -> Progress | None:
    """None before the first state. Raises UserError for a damaged file."""
    try:
        return documents.load(
            folder / PROGRESS, Progress, f"delete {folder} to train this stage from its start"
        )
    except FileNotFoundError:
        return None


def _resume(accelerator: Accelerator, folder: Path, steps: int) -> int:
    """Load the last complete state; returns the number of steps that are done."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = _progress(folder)
    if saved is None:
        return 0
    if saved.step > steps:
        raise UserError(
            f"{folder / PROGRESS} is of {saved.step} steps and the stage has {steps}: delete {folder}."
        )
    accelerator.load_state(str(folder / saved.state))
    return saved.step
