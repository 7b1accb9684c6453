"""Reading over several memories, for episodes that outgrow the K slots of one (as in Larimar, arXiv 2403.11901).

The memory to read is the one that knows the key best: the posterior variance of a reading, w U w', is |w|^2 in an empty
memory and falls to about s2 for a key that was written. A choice of our own: it needs no training, and one reading.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from microvlm.runtime import MemoryArrays


def key_variance(key: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """w U w' / (w w'): key [B, K], U [B or 1, K, K] -> [B], near 1 for a key that nothing was written under."""
    spread = np.matmul(covariance, key[:, :, None])[:, :, 0]
    return (key * spread).sum(-1) / np.maximum((key * key).sum(-1), np.finfo(key.dtype).tiny)


def choose_memory(key: np.ndarray, states: Sequence[MemoryArrays]) -> np.ndarray:
    """The index of the state that knows each key best: key [B, K] -> int64 [B]; the first of equals."""
    return np.stack([key_variance(key, state.covariance) for state in states]).argmin(0)


def state_for(key: np.ndarray, states: Sequence[MemoryArrays]) -> MemoryArrays:
    """One state a row, [B, K, C] and [B, K, K]: of several states, batch 1 each, the one that knows the row's key.

    For one row it is the state itself, not a copy.
    """
    chosen = choose_memory(key, states)
    if len(chosen) == 1:
        return states[chosen[0]]
    return MemoryArrays(
        *(np.concatenate([part[index] for index in chosen]) for part in zip(*states, strict=True))
    )
