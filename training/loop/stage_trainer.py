"""A stage's module with its optimisers, schedules and batches, on Accelerate's device. Knows no files."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from microvlm.errors import UserError
from microvlm.model.linear import weights_rounded_once
from microvlm.training.heap import TRIM_EVERY, trim_heap
from microvlm.training.loop.optimizers import build_optimizers, cosine
from microvlm.training.loop.processes import Processes
from microvlm.training.loop.sharding import LossModule, whole_tensor
from microvlm.training.recipe import StageConfig
from microvlm.training.stages.task import Task


class StageBatches(Dataset):
    """The batches of a stage, indexed by step."""

    def __init__(self, task: Task, seed: int, stage: int):
        self.task, self.seed, self.stage = task, seed, stage

    def __getitem__(self, step: int) -> Any:
        """The batch of a step, or the UserError that drawing it raised, which a worker would pack into another one."""
        try:
            return self.task.draw_step(step, step_generator(self.seed, self.stage, step))
        except UserError as error:
            return error


def step_generator(seed: int, stage: int, step: int, process: int = 0) -> torch.Generator:
    """The generator that the batch of this step is drawn with. Part of the recipes' reproducibility.

    process : 0; processes that train together draw one batch and share it.
    """
    return torch.Generator().manual_seed(((seed * 101 + stage) * 1_000_003 + step) * 257 + process)


class StageTrainer:
    """A stage's module with its optimisers and schedules, on the accelerator."""

    def __init__(
        self,
        task: Task,
        stage: StageConfig,
        precision: str,
        accelerator: Accelerator,
        processes: Processes | None = None,
    ):
        self.task, self.stage, self.precision = task, stage, precision
        self._steps = 0
        self.accelerator, self.device = accelerator, accelerator.device
        self.processes = processes or Processes()
        optimizers = build_optimizers(task, stage, self.device)
        self.optimizer_names = [type(optimizer).__name__ for optimizer in optimizers]
        # Together: FSDP2 gives the optimisers its own parameters in place of the module's.
        self.module, *self.optimizers = accelerator.prepare(LossModule(task), *optimizers)
        self.schedulers = [
            accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(stage)))
            for optimizer in self.optimizers
        ]

    @contextmanager
    def precise(self) -> Iterator[None]:
        """The stage's precision; within it every latent weight is rounded once."""
        bfloat16 = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with bfloat16, weights_rounded_once():
            yield

    def step(self, batch: Any) -> dict[str, Any]:
        """Take one optimiser step; returns the loss, the gradient norm and the task's metrics of the whole batch."""
        loss, metrics = self.forward(batch)
        self.accelerator.backward(loss)
        norm = self.update()
        self._steps += 1
        if self._steps % TRIM_EVERY == 0:
            trim_heap()
        return {**self.processes.mean({"loss": loss, **metrics}), "gradient_norm": norm}

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """This process's part of the loss of a batch, at the stage's precision, and of its metrics."""
        with self.precise():
            loss, metrics = self.module(batch)
        return loss, metrics

    def update(self) -> Tensor:
        """Clip the gradients, move the parameters, advance the rates and drop the gradients.

        Returns the gradients' norm over all processes.
        """
        learning = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        norm: Tensor = self.accelerator.clip_grad_norm_(learning, self.stage.max_grad_norm)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        return whole_tensor(norm)

    def rates(self) -> list[float]:
        """The learning rates of all groups, of AdamW first."""
        return [rate for scheduler in self.schedulers for rate in scheduler.get_last_lr()]

    def batches(self, seed: int, index: int, start: int, workers: int) -> DataLoader:
        """The batches from step `start` on, drawn by `workers` processes ahead of the steps."""
        return DataLoader(
            StageBatches(self.task, seed, index),
            batch_size=None,
            collate_fn=_unchanged,
            sampler=range(start, self.stage.steps),
            num_workers=workers,
            # Its own generator: a loader draws its workers' seed, which would advance torch's in a resumed run twice.
            generator=torch.Generator(),
            pin_memory=self.device.type == "cuda",
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_leave_signals_to_the_parent,
        )

    def release(self) -> None:
        """Forget the stage's module and optimisers, so that the next stage's do not add to them."""
        self.accelerator.free_memory()


def _leave_signals_to_the_parent(_: int) -> None:
    """A terminal's Ctrl-C and a service's SIGTERM reach workers too: the parent ends its step, and then them."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _unchanged(batch: Any) -> Any:
    """Replaces the loader's own conversion, which would turn arrays into tensors."""
    return batch
