"""A loss of an output head in chunks of rows: logits over a whole vocabulary are made, used and dropped chunk by chunk.

The gradient is computed beside the loss, as fused cross-entropy kernels do (Hsu et al. 2024, arXiv 2410.10989, section
3.2): logits of a step over 49,152 tokens are many times larger than a processor's cache, and than all else in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 96
"""Rows of a chunk. Fewer would unpack the head's weights more often; more of them leave the cache of a large core."""

ChunkLoss = Callable[[Tensor, slice], Tensor]
"""(hidden [m, H], its rows in the whole) -> the weighted losses [terms], each a sum over the rows."""


class _ChunkedLoss(torch.autograd.Function):
    """Gradients of the sum of all terms, of every chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: ChunkLoss, rows: int, *parameters: Tensor) -> Tensor:
        grad_hidden = torch.empty_like(hidden)
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        grads = [torch.zeros_like(parameter) for parameter in learning]
        terms: Tensor | None = None
        for start in range(0, len(hidden), rows):
            chunk = slice(start, min(start + rows, len(hidden)))
            with torch.enable_grad():
                part = hidden[chunk].detach().requires_grad_()
                sums = loss(part, chunk)
                found = torch.autograd.grad(sums.sum(), [part, *learning], allow_unused=True)
            grad_hidden[chunk] = found[0]
            for grad, new in zip(grads, found[1:], strict=True):
                if new is not None:
                    grad += new
            terms = sums.detach() if terms is None else terms + sums.detach()
        assert terms is not None
        by_parameter = iter(grads)
        whole = [next(by_parameter) if p.requires_grad else None for p in parameters]
        ctx.grads = grad_hidden, whole
        return terms

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        # Every term has one and the same factor: `chunked_loss` returns their sum.
        factor = outputs[0][0]
        grad_hidden, whole = ctx.grads
        return grad_hidden * factor, None, None, *(None if grad is None else grad * factor for grad in whole)


def chunked_loss(
    hidden: Tensor, loss: ChunkLoss, parameters: Sequence[Tensor] = (), rows: int = CHUNK_ROWS
) -> tuple[Tensor, Tensor]:
    """The sum of a loss's terms over hidden states [n, H], n >= 1, `rows` at a time -> (scalar, the terms detached).

    parameters : what the loss reads beside the hidden states and may learn, such as the head's weight.
    """
    terms = _ChunkedLoss.apply(hidden, loss, rows, *parameters)
    return terms.sum(), terms.detach()
