"""The processes that train one model together: how many there are, which one writes, and what they agree on.

Accelerate or torchrun starts them and tells each its number in environment variables; without those, there is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from microvlm.console import note
from microvlm.errors import UserError
from microvlm.training.recipe import StageConfig

T = TypeVar("T")
_LONGEST_WAIT = timedelta(hours=6)
"""A process waits for the others while one evaluates or writes; one that dies ends the others through the launcher."""
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_SHARDS, _CPU = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_CPU"
_REFUSED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


class Processes:
    """One process of `count`; `index` is its number. A process that stands alone communicates nothing."""

    def __init__(self, count: int = 1, index: int = 0, shards: bool = False, cpu: bool = False):
        self.count, self.index, self.cpu = count, index, cpu
        self.shards = shards
        """Whether parameters, gradients and optimisers are split over the processes (FSDP2)."""

    @classmethod
    def join(cls) -> Processes:
        """Meet the other processes that the launcher has started. Raises UserError for a launch that cannot train."""
        launched = "LOCAL_RANK" in os.environ or any(int(os.environ.get(name, "1")) > 1 for name in _SIZES)
        if not launched:
            return cls()
        for variable, name in _REFUSED.items():
            if _is_set(variable):
                raise UserError(
                    f"training with {name} is not supported: configure accelerate for DDP or FSDP."
                )
        shards = _is_set(_SHARDS)
        if shards and os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError(
                "FSDP is supported in its second version: set fsdp_version: 2 in accelerate's file."
            )
        from accelerate import PartialState

        # Without a GPU, Accelerate takes several processes for a defect unless it is told to use the CPU.
        cpu = _is_set(_CPU) or not torch.accelerator.is_available()
        state = PartialState(cpu=cpu, timeout=_LONGEST_WAIT)
        return cls(state.num_processes, state.process_index, shards, cpu)

    @property
    def sharding(self) -> str:
        """How the model lies on the processes, in a report's words."""
        return "FSDP2" if self.shards else "DDP" if self.count > 1 else "none"

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.index == 0

    @cached_property
    def group(self) -> Any:
        """A group of its own for the gathers of losses, so that their backward passes meet no other communication."""
        return torch.distributed.new_group() if self.count > 1 else None

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            torch.distributed.barrier()

    def leave(self) -> None:
        """End the communication with the other processes."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def share(self, value: T) -> T:
        """The main process's value, on every process."""
        return self.gather(value)[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something in the main process alone; every process returns its result, or raises its UserError."""
        outcome: Any = None
        if self.is_main:
            try:
                outcome = work()
            except UserError as error:
                outcome = error
        outcome = self.share(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        result: T = outcome
        return result

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        if self.count == 1:
            return flag
        device = "cpu" if self.cpu else torch.accelerator.current_accelerator()
        value = torch.tensor(int(flag), device=device)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return bool(value)

    def raise_together(self, error: UserError | None) -> None:
        """Raise the first UserError that any process brings, in every process."""
        if not self.any(error is not None):
            return
        raise next(other for other in self.gather(error) if other is not None)

    def mean(self, metrics: dict[str, Any]) -> dict[str, Tensor]:
        """Means over the processes of scalar metrics, whose names are the same in all of them."""
        values = {name: torch.as_tensor(value).detach() for name, value in metrics.items()}
        if self.count == 1:
            return values
        device = next(value.device for value in values.values())
        together = torch.stack([value.to(device).double().reshape(()) for value in values.values()])
        torch.distributed.all_reduce(together)
        return dict(zip(values, together / self.count, strict=True))

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values


def own_error(processes: Processes, sentence: str) -> UserError:
    """The error of one process alone, which it says itself: errors of all of them are said by the main one."""
    if not processes.is_main:
        note(f"process {processes.index}: {sentence}")
    return UserError(sentence)


def check_processes(processes: Processes, stages: Sequence[StageConfig], shared: Sequence[bool]) -> None:
    """Raises UserError for stages that several processes cannot train.

    shared : whether each stage's task shares batches.
    """
    if processes.count == 1 and not processes.shards:
        return
    for stage, shares in zip(stages, shared, strict=True):
        if not shares:
            raise UserError(
                f"stage '{stage.name}' trains in one process, because its task '{stage.task}' does not share batches: "
                "start microvlm-train without accelerate launch."
            )
        if stage.batch_size % processes.count:
            raise UserError(
                f"stage '{stage.name}': {processes.count} processes cannot share a batch of {stage.batch_size} samples "
                f"equally: give a --batch-size that {processes.count} divides."
            )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "y", "on", "t")
