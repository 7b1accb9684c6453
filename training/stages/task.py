"""Parts common to all training stages, and the interface that the trainer and the training loop require."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.model.checkpoint import load_strictly
from microvlm.model.microvlm import MicroVLM
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.loop.processes import Processes
from microvlm.training.recipe import Recipe, StageConfig


class DataFolder(NamedTuple):
    """A data folder that `--data` names, with its weight in a mixture."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class StageInputs:
    """Everything that a stage is built from."""

    config: MicroVLMConfig
    """The preset with the bit widths that this stage trains."""
    rows: TextRows
    recipe: Recipe
    stage: StageConfig
    data: Any
    """What the task's `open_data` returned."""
    start: Path | None = None
    """The checkpoint that the run starts from."""
    text: Path | None = None
    """Plain text on which the decoder alone is evaluated."""
    processes: Processes = field(default_factory=Processes)
    """The processes that train the stage together."""


class Task(ABC):
    """One stage's module, batches and loss.

    The training loop calls `prepare` once, then `draw` and `loss` once a step. A batch is a function of the generator
    that `draw` receives, hence of (seed, stage, step), and `loss` draws no random numbers. So a resumed run trains on
    the batches of an unbroken one, and worker processes may draw ahead.
    """

    mixture_kinds: ClassVar[tuple[str, ...]] = ()
    """Kinds of samples that the `mixture` of such a stage may name."""
    keeps_frozen_parts_out: ClassVar[bool] = False
    """Whether a stage's stored weights leave out what it did not train: that is what the run started from."""
    shares_batches: ClassVar[bool] = False
    """Whether several processes can train the stage: each computes a part of the loss, and the mean of their losses is
    the loss of the whole batch."""
    module: nn.Module
    """Everything that is saved and resumed within the stage."""

    def __init__(self, inputs: StageInputs):
        self.check(inputs.stage)
        self.config, self.rows, self.stage = inputs.config, inputs.rows, inputs.stage
        self.recipe = inputs.recipe

    @classmethod
    @abstractmethod
    def open_data(cls, folders: Sequence[DataFolder]) -> Any:
        """Open the data folders of a run. Raises UserError for other data than this task trains on."""

    @classmethod
    @abstractmethod
    def tokenizer_texts(cls, data: Any) -> Iterable[str]:
        """The texts that the tokenizer of a model without one is trained on."""

    @classmethod
    def epoch_samples(cls, data: Any) -> int | None:
        """Samples in one pass over the data; None if there are no passes."""
        return None

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

    @classmethod
    def describe_data(cls, data: Any) -> Any:
        """What identifies the data in a run's description, as JSON; None for data that its folder's name identifies."""
        return None

    @abstractmethod
    def parameter_groups(self) -> list[dict]:
        """Optimiser groups, each with `params` and `lr`."""

    def prepare(self) -> None:  # noqa: B027 (most stages prepare nothing)
        """Compute what batches depend on beside the generator. Weights are loaded and on their device by now."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Any:
        """Sample a batch, on the CPU. Worker processes call it, so it must not touch the module."""

    def draw_step(self, step: int, generator: torch.Generator) -> Any:
        """The batch of `step`, counted from 0. A task whose batches walk through its data uses the step itself."""
        return self.draw(generator)

    def keys(self, batch: Any) -> list[str]:
        """Names of a batch's samples, for a report about it."""
        return []

    def size(self, batch: Any) -> tuple[int, int]:
        """Numbers of samples and of tokens in a batch, which speeds are counted in."""
        return self.stage.batch_size, 0

    def memory(self) -> tuple[Tensor, ...]:
        """M and U of the last batch's episodes, which a saved state keeps; nothing for a task without episodes."""
        return ()

    @contextmanager
    def evaluated_on(self, tensors: dict[str, Tensor]) -> Iterator[nn.Module]:
        """Within, the task evaluates a module of these weights, because its own is split over processes."""
        raise NotImplementedError
        yield

    def evaluate(self, run: Path, step: int) -> dict[str, float]:
        """Evaluate on held-out data; called without gradients. `evaluation/loss` decides which weights are the best."""
        return {}

    def draw_pictures(
        self, module: Any, batch: Any, folder: Path, step: int
    ) -> tuple[dict[str, Path], dict[str, float]]:
        """Draw heatmaps of a batch into `folder` -> (pictures by name, metrics that cost too much for every step)."""
        return {}, {}

    @abstractmethod
    def loss(self, module: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and the metrics to log beside it."""

    @abstractmethod
    def continue_from(self, tensors: dict[str, Tensor], source: str) -> None:
        """Load the weights that the stage before has stored. Raises UserError if this stage cannot use them."""

    def result(self) -> nn.Module:
        """The module whose weights the next stage starts from."""
        return self.module

    def heads(self) -> nn.Module | None:
        """Heads that exist in training only and that the next stage, or the next run, goes on with; None if none do."""
        return None


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
