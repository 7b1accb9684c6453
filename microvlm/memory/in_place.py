"""A memory state that is changed in place: in a backend's own buffers, or by the functions of `Runtime`.

Those functions take a state and return a new one; a backend with buffers of its own saves that copy.
"""

from __future__ import annotations

import numpy as np

from microvlm.runtime import HeldMemory, HoldsMemory, MemoryArrays, Runtime


class FunctionalMemory:
    """`HeldMemory` over the functions of a runtime, each of which returns a new state."""

    def __init__(self, runtime: Runtime, state: MemoryArrays):
        self._runtime, self.state = runtime, state

    def snapshot(self) -> MemoryArrays:
        return MemoryArrays(*(part.copy() for part in self.state))

    def write(self, key: np.ndarray, latent: np.ndarray) -> None:
        self.state = self._runtime.memory_write(key, latent, self.state)

    def forget(self, key: np.ndarray, latent: np.ndarray) -> None:
        self.state = self._runtime.memory_forget(key, latent, self.state)

    def overwrite(
        self, old_key: np.ndarray, old_latent: np.ndarray, key: np.ndarray, latent: np.ndarray
    ) -> None:
        remaining = self._runtime.memory_forget(old_key, old_latent, self.state)
        self.state = self._runtime.memory_write(key, latent, remaining)


def hold(runtime: Runtime, state: MemoryArrays) -> HeldMemory:
    """Hold `state` in the buffers of a runtime that `HoldsMemory`, else in a `FunctionalMemory`.

    The arrays of `state` are never changed.
    """
    return (
        runtime.hold_memory(state) if isinstance(runtime, HoldsMemory) else FunctionalMemory(runtime, state)
    )
