"""Optimisers, learning-rate schedules and the precision that a machine computes in."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from microvlm.training.loop.muon import Float32Muon
from microvlm.training.recipe import StageConfig
from microvlm.training.stages.task import Task


def build_optimizers(task: Task, stage: StageConfig, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW for vectors, embeddings and heads; Muon for the blocks' matrices if the stage has a `muon_factor`.

    Muon orthogonalises each update (Jordan et al. 2024). Its rate is scaled to the size of AdamW's updates (Liu et al.
    2025, arXiv 2502.16982), so that one schedule and one weight decay serve both.
    """
    blocks = {
        id(p)
        for name, p in task.module.named_parameters()
        if name.endswith(".weight")
        and p.ndim == 2
        and ("layers." in name or "adapter." in name)
        # A table with a column a class: most of them have no gradient in a step.
        and name != "adapter.classes.weight"
    }
    muon, adam = [], []
    for group in task.parameter_groups():
        hidden = [p for p in group["params"] if stage.muon_factor > 0 and id(p) in blocks]
        hidden_ids = {id(p) for p in hidden}
        rest = [p for p in group["params"] if id(p) not in hidden_ids]
        muon += [{"params": hidden, "lr": stage.muon_factor * group["lr"]}] if hidden else []
        adam += [{"params": rest, "lr": group["lr"]}] if rest else []
    optimizers: list[torch.optim.Optimizer] = [
        # One pass over memory in place of a dozen: of 150 million parameters on a CPU a third of a second, not two.
        torch.optim.AdamW(
            adam, weight_decay=stage.weight_decay, betas=(0.9, 0.98), fused=device.type in ("cpu", "cuda")
        )
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


def has_bfloat16() -> bool:
    """Whether this machine has bfloat16 arithmetic; emulating it was measured 200 times slower than float32."""
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def usable_precision(precision: str, log: Callable[[str], None]) -> str:
    """`precision`, or `no` if it is bf16 and this machine would emulate that."""
    if precision == "bf16" and not has_bfloat16():
        log("this CPU has no bfloat16 arithmetic: training in float32")
        return "no"
    return precision
