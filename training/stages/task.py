"""Parts common to all training stages, and the interface that the trainer and the training loop require."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.model.checkpoint import load_strictly
from microvlm.model.microvlm import MicroVLM
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.emoji.data.emoji import EmojiData
from microvlm.training.recipe import Recipe, StageConfig


@dataclass(frozen=True)
class StageInputs:
    """Everything that a stage is built from."""

    config: MicroVLMConfig
    """The preset with the bit widths that this stage trains."""
    rows: TextRows
    recipe: Recipe
    stage: StageConfig
    emoji: EmojiData


class Task(ABC):
    """One stage's module, batches and loss.

    The training loop calls `prepare` once, then `draw` and `loss` once a step. A batch is a function of the generator
    that `draw` receives, hence of (seed, stage, step), and `loss` draws no random numbers. So a resumed run trains on
    the batches of an unbroken one, and worker processes may draw ahead.
    """

    mixture_kinds: ClassVar[tuple[str, ...]] = ()
    """Kinds of samples that the `mixture` of such a stage may name."""
    module: nn.Module
    """Everything that is saved and resumed within the stage."""

    def __init__(self, inputs: StageInputs):
        self.check(inputs.stage)
        self.config, self.rows, self.stage = inputs.config, inputs.rows, inputs.stage
        self.recipe, self.emoji = inputs.recipe, inputs.emoji

    @classmethod
    def check(cls, stage: StageConfig) -> None:
        """Raises UserError for a stage that this task cannot train. A run checks all stages before it writes."""
        unknown = [kind for kind in stage.mixture if kind not in cls.mixture_kinds]
        if unknown:
            kinds = ", ".join(cls.mixture_kinds) or "no kinds at all"
            raise UserError(
                f"stage '{stage.name}': its mixture names {quote(unknown[0])}; for a {stage.task} stage it may name "
                f"{kinds}."
            )

    @abstractmethod
    def parameter_groups(self) -> list[dict]:
        """Optimiser groups, each with `params` and `lr`."""

    def prepare(self) -> None:  # noqa: B027 (most stages prepare nothing)
        """Compute what batches depend on beside the generator. Weights are loaded and on their device by now."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Any:
        """Sample a batch, on the CPU. Worker processes call it, so it must not touch the module."""

    @abstractmethod
    def loss(self, module: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and the metrics to log beside it."""

    @abstractmethod
    def continue_from(self, tensors: dict[str, Tensor], source: str) -> None:
        """Load the weights that the stage before has stored. Raises UserError if this stage cannot use them."""

    def result(self) -> nn.Module:
        """The module whose weights the next stage starts from."""
        return self.module


class WholeModelTask(Task):
    """A stage that trains a whole model, which a checkpoint can start."""

    def __init__(self, inputs: StageInputs):
        super().__init__(inputs)
        self.model = MicroVLM(inputs.config)

    def continue_from(self, tensors: dict[str, Tensor], source: str) -> None:
        """Load a whole model; the parts named in the stage's `fresh` keep their initial weights."""
        initial = self.model.state_dict()
        if set(tensors) != set(initial):
            raise UserError(f"a {self.stage.task} stage needs a whole model: put a vlm stage before it.")
        mixed = {
            name: initial[name] if name.split(".")[0] in self.stage.fresh else tensors[name]
            for name in tensors
        }
        load_strictly(self.model, mixed, source)

    def result(self) -> nn.Module:
        return self.model
