"""The Muon optimiser in float32 (Jordan et al. 2024, kellerjordan.github.io/posts/muon), for GPUs and older CPUs.

`torch.optim.Muon` orthogonalises in bfloat16. A CPU without bfloat16 emulates it, which was measured to take two thirds
of a training step. On a GPU it launches one product per matrix, which was a sixth of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Float32Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum, scaled to the root mean square of AdamW's updates, with decoupled weight decay.

    Defaults and scaling equal `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`. Parameters must be float matrices.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                updates = self._updates(weights, group["momentum"])
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, updates, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def _updates(self, weights: list[Tensor], momentum: float) -> tuple[Tensor, ...]:
        """Updates of weights of one shape, computed together: a GPU's time goes into launches, not into products."""
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        averages = [self.state[weight]["momentum_buffer"] for weight in weights]
        grads = [weight.grad for weight in weights if weight.grad is not None]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        return orthogonalise(torch.stack(torch._foreach_lerp(grads, averages, momentum))).unbind()


def orthogonalise(matrices: Tensor, eps: float = 1e-7) -> Tensor:
    """Bring the singular values of matrices [..., N, K] near 1 by a quintic Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    flat = matrices.flatten(0, -3) if matrices.dim() > 2 else matrices.unsqueeze(0)
    wide = flat.shape[1] <= flat.shape[2]
    x = flat if wide else flat.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).reshape(matrices.shape)
