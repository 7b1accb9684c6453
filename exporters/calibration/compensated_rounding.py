"""Rounds a matrix to four bits so that its outputs move least: GPTQ with fixed groups, and a search for their scales.

Frantar et al. 2022 (arXiv 2210.17323): columns are rounded one after another, and what a column's rounding does to the
outputs is made up for by the columns that are still to come, by the inverse of the inputs' second moments H = X'X.
Columns with large inputs come first. Groups are those of the packing, 32 neighbours of a row, and their scales are
chosen before: of several shrunken ones that with the least error, weighted by the diagonal of H (as in AWQ, Lin et al.
2023, arXiv 2306.00978, where clipping is searched so). At the end a row's scale is refitted by least squares under H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from microvlm.formats.packing import GROUP

LARGEST = 7
"""Codes are -7..7."""
MOST_MULTIPLIER = 255
_SHRUNKEN = tuple(1 - 0.025 * step for step in range(17))
_BLOCK = 64
"""Columns after which the rest of the matrix gets its corrections."""
_DAMPING = 0.01


def round_matrix(weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [N, K] and H float64 [K, K] -> (q int8 [N, K], multiplier uint8 [N, K / 32], scale float32 [N]).

    The weight that is stored is q * multiplier * scale. Raises ValueError where K is no multiple of 32, or an H is not
    that of finite inputs.
    """
    rows, columns = weight.shape
    if columns % GROUP:
        raise ValueError(f"{columns} columns are no whole groups of {GROUP}")
    if not torch.isfinite(moments).all():
        raise ValueError("the inputs of a layer are not finite")
    moments = moments.double().clone()
    # A column without inputs may have any weight.
    unused = moments.diagonal() <= 0
    moments[unused, unused] = 1
    multiplier, scale = _scales(weight, moments.diagonal().float())
    steps = (multiplier.float() * scale[:, None]).repeat_interleave(GROUP, 1)
    order = moments.diagonal().argsort(descending=True, stable=True)
    permuted = moments[order][:, order]
    permuted += _DAMPING * permuted.diagonal().mean() * torch.eye(columns, dtype=permuted.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(permuted))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    codes = torch.empty(rows, columns)
    codes[:, order] = _compensate(weight[:, order].clone(), steps[:, order], factor)
    return codes.to(torch.int8), multiplier, _refit(weight, codes, multiplier, scale, moments)


def _scales(weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """(multiplier uint8 [N, G], scale [N]) whose product has the least weighted error of rounding each group."""
    groups = weight.view(len(weight), -1, GROUP)
    widest = (groups.abs().amax(2) / LARGEST).clamp(min=1e-12)
    shares = importance.view(-1, GROUP)
    best, least = widest, torch.full_like(widest, torch.inf)
    for shrink in _SHRUNKEN:
        step = widest * shrink
        rounded = (groups / step[:, :, None]).round().clamp(-LARGEST, LARGEST) * step[:, :, None]
        error = ((rounded - groups).square() * shares).sum(2)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    scale = best.amax(1) / MOST_MULTIPLIER
    return (best / scale[:, None]).round().clamp(1, MOST_MULTIPLIER).to(torch.uint8), scale


def _compensate(weight: Tensor, steps: Tensor, factor: Tensor) -> Tensor:
    """Codes [N, K] of columns in the order of `factor`, the upper Cholesky factor of the damped inverse of H."""
    columns = weight.shape[1]
    codes = torch.empty_like(weight)
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        errors = torch.empty(len(weight), end - begin)
        for column in range(begin, end):
            step, current = steps[:, column], weight[:, column]
            codes[:, column] = (current / step).round().clamp(-LARGEST, LARGEST)
            error = (current - codes[:, column] * step) / factor[column, column]
            weight[:, column:end] -= error[:, None] * factor[column, column:end]
            errors[:, column - begin] = error
        weight[:, end:] -= errors @ factor[begin:end, end:]
    return codes


def _refit(weight: Tensor, codes: Tensor, multiplier: Tensor, scale: Tensor, moments: Tensor) -> Tensor:
    """The scale of each row that moves its outputs least: argmin_g (w - g r) H (w - g r)' = (r H w') / (r H r')."""
    unscaled = codes * multiplier.float().repeat_interleave(GROUP, 1)
    weighted = unscaled @ moments.float()
    dot, square = (weighted * weight).sum(1), (weighted * unscaled).sum(1)
    fitted = dot / square.clamp(min=torch.finfo(square.dtype).tiny)
    return torch.where((square > 0) & (fitted > 0), fitted, scale)
