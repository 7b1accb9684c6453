"""Length of a run: steps, epochs, or a budget of steps or time, converted to the steps of each stage beforehand."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.training.recipe import Recipe, StageConfig

_BUDGET = re.compile(r"(?P<number>\d{1,9}(?:\.\d{1,3})?)\s*(?P<unit>[a-z]*)")
_SECONDS = {
    "s": 1,
    "sec": 1,
    "m": 60,
    "min": 60,
    "minutes": 60,
    "minute": 60,
    "h": 3600,
    "hours": 3600,
    "hour": 3600,
}
_STEPS = ("", "steps", "step")
TRAINING_SHARE = 0.85
"""Share of a time budget that is spent on steps; the rest is for evaluations, states and pictures."""


@dataclass(frozen=True)
class Budget:
    """How long a run may take in all: a number of steps, or seconds."""

    steps: int | None = None
    seconds: float | None = None


def parse_budget(text: str) -> Budget:
    """`300`, `300 steps`, `8m`, `90s` or `1.5h`. Raises UserError."""
    match = _BUDGET.fullmatch(text.strip().lower())
    if match is not None:
        number, unit = float(match["number"]), match["unit"]
        if unit in _STEPS and number == int(number) and 1 <= number <= 10_000_000:
            return Budget(steps=int(number))
        if unit in _SECONDS and 1 <= number * _SECONDS[unit] <= 10_000_000:
            return Budget(seconds=number * _SECONDS[unit])
    raise UserError(f"--budget is {quote(text)}: give steps (300) or a time (90s, 8m, 1.5h).")


def resolve_steps(
    recipe: Recipe,
    epoch_samples: int | None,
    budget: Budget | None,
    step_seconds: Callable[[int], float],
    skipped: int = 0,
) -> Recipe:
    """The recipe with the steps of every stage and of its states, and no epochs.

    A budget is divided among the stages as the recipe divides its steps; time is converted by `step_seconds`, which
    measures a step of a stage. The first `skipped` stages are not run. Raises UserError for epochs over data that has
    none.
    """
    shares = [_steps(stage, epoch_samples) for stage in recipe.stages]
    steps, run = list(shares), shares[skipped:]
    if budget is not None and budget.steps is not None:
        steps[skipped:] = divide(budget.steps, run)
    elif budget is not None and budget.seconds is not None:
        steps[skipped:] = [
            max(1, int(budget.seconds * TRAINING_SHARE * share / sum(run) / step_seconds(index)))
            for index, share in enumerate(run, skipped)
        ]
    stages = tuple(
        msgspec.structs.replace(stage, steps=count, epochs=0.0)
        for stage, count in zip(recipe.stages, steps, strict=True)
    )
    save_every = recipe.save_every
    if recipe.save_every_epochs:
        if epoch_samples is None:
            raise UserError("this data has no epochs: give save_every in steps.")
        batch = recipe.stages[0].batch_size
        save_every = max(1, round(recipe.save_every_epochs * epoch_samples / batch))
        # A kill should not lose more than a twentieth of a stage, however large the data is.
        save_every = min(save_every, max(10, max(steps) // 20))
    return msgspec.structs.replace(recipe, stages=stages, save_every=save_every, save_every_epochs=0.0)


def divide(total: int, shares: list[int]) -> list[int]:
    """`total` in the proportion of `shares`, each at least 1; they add up to `total` where it allows that."""
    whole, result, before, given = sum(shares), [], 0, 0
    for share in shares:
        before += share
        end = round(total * before / whole)
        result.append(max(1, end - given))
        given = max(end, given + 1)
    return result


def _steps(stage: StageConfig, epoch_samples: int | None) -> int:
    if stage.steps:
        return stage.steps
    if epoch_samples is None:
        raise UserError(f"stage '{stage.name}' is in epochs, which this data has not: give steps.")
    return max(1, round(stage.epochs * epoch_samples / stage.batch_size))
