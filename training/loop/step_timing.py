"""Measures how long a step of a stage takes on this machine, for a budget in time."""

from __future__ import annotations

import statistics
import time

import torch

from microvlm.model.linear import weights_rounded_once
from microvlm.training.recipe import Recipe
from microvlm.training.stages.task import Task

MEASURED = 3
"""Steps that are timed, after one that warms up."""


def measure_step_seconds(task: Task, recipe: Recipe, index: int) -> float:
    """Median seconds of a batch, its loss and its gradients, in float32. The task's weights do not change."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = task.module.to(device)
    seconds = []
    for step in range(MEASURED + 1):
        began = time.perf_counter()
        batch = task.draw_step(step, torch.Generator().manual_seed(recipe.seed * 101 + index + step))
        with weights_rounded_once():
            loss, _ = task.loss(module, batch)
            loss.backward()
        float(loss.detach())
        module.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    module.to("cpu")
    return statistics.median(seconds[1:])
