"""Rows of all processes, with gradients: contrastive negatives and the pictures that episodes write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _Gather(torch.autograd.Function):
    """Tensors of one shape of all processes, one after another; a gradient is the sum of all processes' gradients.

    PyTorch deprecates `torch.distributed.nn.functional.all_gather`, and what it names instead is private and new.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0].contiguous()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad[torch.distributed.get_rank(ctx.group)], None


def gather_rows(rows: Tensor, counts: Sequence[int], group: Any) -> Tensor:
    """Concatenate the processes' rows [n, W] in the order of the processes.

    counts : n of each process. A row's gradient is the sum of the gradients that the processes have for it: averaged
    over processes, the gradients of parameters are those of the processes' mean loss.
    """
    if len(counts) == 1:
        return rows
    padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows)))
    gathered: Tensor = _Gather.apply(padded, group)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
