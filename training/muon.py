"""Muon in float32 (Jordan et al. 2024, kellerjordan.github.io/posts/muon), for CPUs without bfloat16.

`torch.optim.Muon` orthogonalises in bfloat16, which such a CPU emulates: measured, two thirds of a training step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Float32Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled to the root mean square of AdamW's updates; weight decay decoupled.

    The defaults and the scaling are those of `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`. Parameters are float
    matrices.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                average = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalise(weight.grad.lerp(average, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)


def orthogonalise(matrix: Tensor, eps: float = 1e-7) -> Tensor:
    """[N, K] -> the same singular vectors with singular values near 1, by a quintic Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T
