"""Larimar's episodic memory as pure functions over an explicit state (Das et al. 2024, arXiv 2403.11901, section 3).

A state is a mean M [B, K, C] and a row covariance U [B, K, K], float32 or float64. Functions take a state and return
a new one. Writing rows one at a time is exact recursive least squares: it equals the batch ridge solution, and
forgetting a row gives the state without it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MemoryState(NamedTuple):
    """A memory's posterior: mean and row covariance."""

    mean: Tensor
    """M, [B, K, C]."""
    covariance: Tensor
    """U, [B, K, K]."""


def prior(mean: Tensor, batch: int = 1) -> MemoryState:
    """The empty memory: R0 [K, C] -> M = R0, U = I."""
    slots = mean.shape[0]
    eye = torch.eye(slots, dtype=mean.dtype, device=mean.device)
    return MemoryState(mean.expand(batch, -1, -1), eye.expand(batch, -1, -1))


def address(latent: Tensor, pseudo_inverse: Tensor) -> Tensor:
    """Key w = z pinv(M_ref) [B, K] of latents [B, C]. M_ref is fixed, so that forgetting can compute the key again."""
    return latent @ pseudo_inverse


def write(state: MemoryState, key: Tensor, latent: Tensor, observation_variance: float) -> MemoryState:
    """Write one row by a Kalman update: key w [B, K], latent z [B, C], variance s2 (Larimar eq. 3, Sherman-Morrison).

    d = z - wM ; a = U w' ; s = w a + s2 ; M + (a / s) d ; U - a a' / s
    """
    residual = latent - torch.einsum("bk,bkc->bc", key, state.mean)
    spread = torch.einsum("bkj,bj->bk", state.covariance, key)
    gain = spread / ((key * spread).sum(-1, keepdim=True) + observation_variance)
    return MemoryState(
        state.mean + gain.unsqueeze(-1) * residual.unsqueeze(-2),
        state.covariance - spread.unsqueeze(-1) * gain.unsqueeze(-2),
    )


def forget(state: MemoryState, key: Tensor, latent: Tensor, observation_variance: float) -> MemoryState:
    """Undo `write` of the same key and latent, whatever was written since: a write with variance -s2.

    d = s2 - w a, positive for a row that was written ; M - (a / d)(z - wM) ; U + a a' / d
    """
    return write(state, key, latent, -observation_variance)


def read(state: MemoryState, key: Tensor) -> Tensor:
    """Read z_r = w M: key [B, K] -> latent [B, C]. Deterministic; only training adds noise."""
    return torch.einsum("bk,bkc->bc", key, state.mean)


def key_variance(key: Tensor, covariance: Tensor) -> Tensor:
    """Relative posterior variance of a reading, w U w' / (w w'): [B, K] and [B, K, K] -> [B].

    1 in an empty memory, near s2 / (w w' + s2) for a key that was written alone.
    """
    spread = torch.einsum("bkj,bj->bk", covariance, key)
    return (key * spread).sum(-1) / (key * key).sum(-1).clamp(min=1e-12)


def agreement(query: Tensor, read: Tensor, query_key: Tensor, read_key: Tensor) -> Tensor:
    """Cosine of two latents [B, C] outside the subspace of their keys [B, K] -> [B].

    The rows of M_ref are orthonormal, so the product of two keys is the part of the latents' product inside it.
    """
    inner = (query * read).sum(-1) - (query_key * read_key).sum(-1)
    lengths = [
        (latent.square().sum(-1) - key.square().sum(-1)).clamp(min=1e-8)
        for latent, key in ((query, query_key), (read, read_key))
    ]
    return inner / (lengths[0] * lengths[1]).sqrt()


def batch_solution(
    prior_mean: Tensor, keys: Tensor, latents: Tensor, observation_variance: float
) -> MemoryState:
    """Ridge posterior of E rows at once, the reference for sequential writing: R0 [K, C], W [E, K], Z [E, C].

    W [B, E, K] and Z [B, E, C] give B memories. Rows of zeros change nothing, so shorter memories can be padded.
    """
    keys, latents = (rows if rows.dim() == 3 else rows.unsqueeze(0) for rows in (keys, latents))
    eye = torch.eye(prior_mean.shape[0], dtype=prior_mean.dtype, device=prior_mean.device)
    precision = eye + keys.mT @ keys / observation_variance
    # Not `torch.linalg.inv`: with two threads, PyTorch 2.13 factors batches of matrices from 256 x 256 by LU wrongly.
    covariance = torch.cholesky_inverse(_cholesky(precision))
    mean = covariance @ (prior_mean + keys.mT @ latents / observation_variance)
    return MemoryState(mean, covariance)


def _cholesky(matrices: Tensor) -> Tensor:
    """Lower factors of matrices [..., K, K]; NaN of those that are not positive definite, which the loss then shows."""
    factors, info = torch.linalg.cholesky_ex(matrices)
    return torch.where((info != 0)[..., None, None], torch.nan, factors)


def pinv_newton_schulz(matrix: Tensor, steps: int = 15, alpha: float = 5e-4) -> Tensor:
    """Larimar's iterative pseudo-inverse (Ben-Israel & Cohen 1966): X <- 2X - X A X from X0 = alpha A'.

    Recovers the share 1 - (1 - alpha s^2)^(2^steps) of a singular value s, so its error is known; the model uses
    `torch.linalg.pinv`. Raises ValueError where it would diverge, alpha s^2 > 2.
    """
    if alpha * torch.linalg.matrix_norm(matrix, 2).max() ** 2 > 2:
        raise ValueError("alpha * s_max^2 is over 2: the iteration diverges; lower alpha")
    estimate = alpha * matrix.transpose(-1, -2)
    for _ in range(steps):
        estimate = 2 * estimate - estimate @ matrix @ estimate
    return estimate


def reference_memory(slots: int, code_size: int, seed: int = 0) -> Tensor:
    """The fixed reference M_ref [K, C] with orthonormal rows, so that keys of random latents spread over all slots.

    Raises ValueError unless K < C: at K = C a reading equals its query, whatever was written.
    """
    if slots >= code_size:
        raise ValueError(f"{slots} slots must be fewer than the {code_size} numbers of a latent")
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(code_size, slots, generator=generator, dtype=torch.float64, device="cpu")
    return torch.linalg.qr(gaussian).Q.T.float().contiguous()


def memory_kl(state: MemoryState, prior_mean: Tensor) -> Tensor:
    """KL divergence of the memory's posterior from its prior, per element (Larimar eq. 5, U0 = I) -> scalar."""
    slots, width = prior_mean.shape
    trace = width * state.covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    moved = (state.mean - prior_mean).square().sum((-1, -2))
    logdet = 2 * _cholesky(state.covariance).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return (0.5 * (trace + moved - slots * width - width * logdet) / (slots * width)).mean()


def addressing_kl(key: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of the addressing posterior N(w, e^log_variance) from N(0, 1), per element -> scalar."""
    return 0.5 * (log_variance.exp() + key.square() - 1 - log_variance).mean()
