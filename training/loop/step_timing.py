"""Measures how long a step of a stage takes on this machine, for a budget in time."""

from __future__ import annotations

import statistics
import time

import torch

from microvlm.model.linear import weights_rounded_once
from microvlm.training.loop.optimizers import usable_precision
from microvlm.training.recipe import Recipe
from microvlm.training.stages.task import Task

MEASURED = 3
"""Steps that are timed, after one that warms up."""


def measure_step_seconds(task: Task, recipe: Recipe, index: int) -> float:
    """Median seconds of a batch, its loss and its gradients, at the stage's precision. Changes no weight."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = usable_precision(task.stage.mixed_precision or recipe.mixed_precision, lambda _: None)
    module = task.module.to(device)
    seconds = []
    for step in range(MEASURED + 1):
        began = time.perf_counter()
        batch = task.draw_step(step, torch.Generator().manual_seed(recipe.seed * 101 + index + step))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"), weights_rounded_once():
            loss, _ = task.loss(module, batch)
            loss.backward()
        float(loss.detach())
        module.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    module.to("cpu")
    return statistics.median(seconds[1:])
