"""Chooses which of several memory states to read, for episodes with more facts than the K slots of one state.

It takes the state that knows the key best. The posterior variance of a reading, w U w', is |w|^2 in an empty memory and
about s2 for a key that was written (Larimar, arXiv 2403.11901). This choice is our own; it needs no training and only
one reading.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from microvlm.runtime import MemoryArrays


def key_variance(key: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Relative posterior variance w U w' / (w w') of keys [B, K] with U [B or 1, K, K] -> [B]; 1 for an unknown key."""
    spread = np.matmul(covariance, key[:, :, None])[:, :, 0]
    return (key * spread).sum(-1) / np.maximum((key * key).sum(-1), np.finfo(key.dtype).tiny)


def choose_memory(key: np.ndarray, states: Sequence[MemoryArrays]) -> np.ndarray:
    """Index of the state that knows each key [B, K] best -> int64 [B], the first of equals."""
    return np.stack([key_variance(key, state.covariance) for state in states]).argmin(0)


def state_for(key: np.ndarray, states: Sequence[MemoryArrays]) -> MemoryArrays:
    """Choose a state, batch 1 each, for every row of `key` [B, K] -> one state per row, [B, K, C] and [B, K, K].

    For a single row it is the state itself, not a copy.
    """
    indices = choose_memory(key, states)
    if len(indices) == 1:
        return states[indices[0]]
    return MemoryArrays(
        *(np.concatenate([part[index] for index in indices]) for part in zip(*states, strict=True))
    )
