"""The training loop: optimiser, schedule, Accelerate, JSONL log, resumable checkpoints. Knows no task.

A batch is a function of (seed, stage, step) alone, so a resumed run sees the very samples it would have seen.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from microvlm.model.linear import weights_rounded_once
from microvlm.training.muon import Float32Muon
from microvlm.training.recipe import Recipe, StageConfig
from microvlm.training.run_provenance import record_run


class Task(Protocol):
    """What a stage optimises."""

    module: nn.Module
    """All that is saved and resumed."""

    def parameter_groups(self) -> list[dict]:
        """Optimiser groups; `lr` in each."""
        ...

    def draw(self, generator: torch.Generator) -> Any:
        """A batch, of the generator alone: `workers` draw many at a time, each in a process without the model."""
        ...

    def loss(self, module: Any, drawn: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a drawn batch, and what to log beside it."""
        ...


class Draws(Dataset):
    """The batches of a stage, by step."""

    def __init__(self, task: Task, seed: int, stage: int, process: int):
        self.task, self.seed, self.stage, self.process = task, seed, stage, process

    def __getitem__(self, step: int) -> Any:
        return self.task.draw(step_generator(self.seed, self.stage, step, self.process))


def build_optimizers(task: Task, stage: StageConfig, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW for vectors, embeddings and heads; Muon for the matrices of the blocks where the stage asks for it.

    Muon orthogonalises each update (Jordan et al. 2024); its rate is scaled to AdamW's update size
    (Liu et al. 2025, arXiv 2502.16982), so that one schedule and one decay serve both.
    """
    blocks = {
        id(p)
        for name, p in task.module.named_parameters()
        if name.endswith(".weight") and p.ndim == 2 and ("layers." in name or "adapter." in name)
    }
    muon, adam = [], []
    for group in task.parameter_groups():
        hidden = [p for p in group["params"] if stage.muon_factor > 0 and id(p) in blocks]
        kept = {id(p) for p in hidden}
        rest = [p for p in group["params"] if id(p) not in kept]
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
    """Linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(stage.steps * stage.warmup_fraction))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, stage.steps - warmup)))

    return factor


def step_generator(seed: int, stage: int, step: int, process: int) -> torch.Generator:
    return torch.Generator().manual_seed(((seed * 101 + stage) * 1_000_003 + step) * 257 + process)


STATES = ("state0", "state1")
PROGRESS = "progress.json"


def has_bfloat16() -> bool:
    """Whether this machine computes in bfloat16: emulating it was measured 200 times slower than float32."""
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def usable_precision(wanted: str, log: Callable[[str], None]) -> str:
    """`wanted`, or `no` where that is bf16 and this machine would emulate it."""
    if wanted == "bf16" and not has_bfloat16():
        log("this CPU has no bfloat16 arithmetic: training in float32")
        return "no"
    return wanted


def run_stage(
    task: Task,
    recipe: Recipe,
    index: int,
    folder: Path,
    log: Callable[[str], None],
    stop_after: int | None = None,
    workers: int = 0,
) -> bool:
    """Train stage `index`, resuming from `folder`/state when it is there. Returns whether the stage is complete.

    `stop_after` ends the call after that many steps of this call, with the state saved: a session's time limit.
    `workers` processes draw the batches ahead; what is drawn does not depend on them.
    """
    stage = recipe.stages[index]
    precision = usable_precision(stage.mixed_precision or recipe.mixed_precision, log)
    # Autocast is entered here: an Accelerator's own cannot change from one stage of a process to the next.
    accelerator = Accelerator(mixed_precision="no")
    device = accelerator.device
    built = build_optimizers(task, stage, device)
    optimizers = [accelerator.prepare(optimizer) for optimizer in built]
    schedulers = [
        accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(stage)))
        for optimizer in optimizers
    ]
    module = accelerator.prepare(task.module)
    start = _resume(accelerator, folder)
    log(f"{stage.name}: {stage.steps} steps" + (f", of which {start} are done" if start else ""))
    if accelerator.is_main_process:
        record_run(folder, start, precision, built)
    log_path = folder / "log.jsonl"
    # Sums stay where they are computed: to fetch a number each step would have the device wait.
    metrics_sum: dict[str, Tensor] = {}
    began = time.perf_counter()
    draws = DataLoader(
        Draws(task, recipe.seed, index, accelerator.process_index),
        batch_size=None,
        collate_fn=_as_drawn,
        sampler=range(start, stage.steps),
        num_workers=workers,
        # Of its own: the loader seeds its workers from it, and a resumed run must not draw twice from the one in use.
        generator=torch.Generator(),
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork" if workers else None,
    )
    for step, drawn in enumerate(draws, start):
        low = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        with low, weights_rounded_once():
            loss, metrics = task.loss(module, drawn)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(module.parameters(), stage.max_grad_norm)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        for key, value in {"loss": loss, "grad_norm": norm, **metrics}.items():
            metrics_sum[key] = metrics_sum.get(key, 0.0) + torch.as_tensor(value).detach()
        done = step + 1
        if done % recipe.log_every == 0 and accelerator.is_main_process:
            seconds = (time.perf_counter() - began) / recipe.log_every
            row: dict[str, Any] = {
                key: round(float(value) / recipe.log_every, 5) for key, value in metrics_sum.items()
            }
            row |= {
                "stage": stage.name,
                "step": done,
                "lr": schedulers[0].get_last_lr()[0],
                "step_s": round(seconds, 4),
            }
            with log_path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            log(
                f"{stage.name} {done}/{stage.steps}  "
                + "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in ("stage", "step"))
            )
            metrics_sum, began = {}, time.perf_counter()
        stopping = stop_after is not None and done - start >= stop_after
        if done % recipe.save_every == 0 or done == stage.steps or stopping:
            _save(accelerator, folder, done)
        if stopping and done < stage.steps:
            return False
    return True


def _as_drawn(batch: Any) -> Any:
    """In the place of a loader's own conversion, which makes tensors of all arrays."""
    return batch


def _save(accelerator: Accelerator, folder: Path, done: int) -> None:
    """Into the one of two state folders that is not the last finished one, which is named afterwards: a crash leaves
    the other."""
    name = STATES[_progress(folder).get("state") == STATES[0]]
    accelerator.save_state(str(folder / name))
    if accelerator.is_main_process:
        aside = folder / "progress.tmp"
        aside.write_text(json.dumps({"state": name, "step": done}))
        aside.replace(folder / PROGRESS)


def _progress(folder: Path) -> dict[str, Any]:
    """The last finished state and its step; empty before the first."""
    path = folder / PROGRESS
    return json.loads(path.read_text()) if path.is_file() else {}


def _resume(accelerator: Accelerator, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    saved = _progress(folder)
    if not saved:
        return 0
    accelerator.load_state(str(folder / saved["state"]))
    return int(saved["step"])
