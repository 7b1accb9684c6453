"""Accelerate's setting up of one or several processes (DDP, FSDP2), and whole tensors of a sharded module."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from microvlm.errors import UserError
from microvlm.training.frozen_base import FOUR_BITS
from microvlm.training.loop.processes import Processes
from microvlm.training.recipe import StageConfig


def build_accelerator(processes: Processes, options: Mapping[str, Any]) -> Any:
    """The Accelerator of a run. options : further arguments of Accelerator, such as the trackers."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs

    # Autocast is entered by the loop: an Accelerator's own cannot change from one stage of a process to the next.
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=processes.cpu,
        # A recipe's batch is the batch of all processes: schedules take one step a batch.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        # A batch without episodes leaves the memory out.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        **options,
    )
    if processes.shards:
        _use_fsdp2(accelerator)
    return accelerator


def _use_fsdp2(accelerator: Any) -> None:
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerator.state
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate takes its FSDP plugin on GPUs alone; PyTorch's fully_shard works on CPUs too.
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # In both of its states: each takes what the other has.
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    # The decoder changes none of its layers' outputs in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    # Every process has loaded the whole model; Accelerate's broadcast of rank 0's refuses buffers.
    state.fsdp_plugin.cpu_ram_efficient_loading = False


def check_sharding(processes: Processes, stages: Sequence[StageConfig], base_bits: int) -> None:
    """Raises UserError for what FSDP cannot train."""
    if not processes.shards:
        return
    for stage in stages:
        if stage.muon_factor > 0:
            raise UserError(
                f"stage '{stage.name}' uses Muon, which needs whole matrices, and FSDP splits them: set its "
                "muon_factor to 0, or use DDP."
            )
    if base_bits == FOUR_BITS:
        raise UserError("--base-bits 4 and FSDP do not go together: leave one of them out.")


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor lies in parts on several processes."""
    return hasattr(tensor, "full_tensor")


def whole_tensors(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """The tensors without sharding, on the main process; nothing on the others, which must call this too."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole_tensor(tensor)
        if processes.is_main:
            whole[name] = full.cpu() if is_sharded(tensor) else full
    return whole


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor without sharding. Of a sharded one, every process must call this."""
    detached: Any = tensor.detach()
    full: Tensor = detached.full_tensor() if is_sharded(tensor) else detached
    return full


def split_like(whole: Tensor, other: Tensor) -> Tensor:
    """`whole` (the same on every process) split over processes as `other` is."""
    if not is_sharded(other):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(whole.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


class LossModule(nn.Module):
    """Computes a task's loss in `forward`, which DDP and FSDP need to see their module used."""

    _no_split_modules = ("DecoderLayer",)
    """What Accelerate's FSDP2 gathers one at a time, where its file names no layers."""

    def __init__(self, task: Any):
        super().__init__()
        self.task = task
        self.module = task.module

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and metrics without gradients."""
        loss, metrics = self.task.loss(self.module, batch)
        return loss, {name: torch.as_tensor(value).detach() for name, value in metrics.items()}
