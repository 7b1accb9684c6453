"""A memory state that is changed in place: in a backend's own buffers where it has them, else as functions give it.

`Runtime`'s functions take a state and return one; holding it spares the copy that each of them makes.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from microvlm.runtime import MemoryArrays, Runtime


class HeldMemory(Protocol):
    """What a backend's `hold_memory(state)` gives: keys [B, K] and latents [B, C], float32."""

    @property
    def state(self) -> MemoryArrays:
        """The state as it is now, not a copy: a later step may change the arrays."""
        ...

    def snapshot(self) -> MemoryArrays:
        """A copy of the state, which no step changes."""
        ...

    def write(self, key: np.ndarray, latent: np.ndarray) -> None: ...

    def forget(self, key: np.ndarray, latent: np.ndarray) -> None: ...

    def overwrite(
        self, old_key: np.ndarray, old_latent: np.ndarray, key: np.ndarray, latent: np.ndarray
    ) -> None:
        """Forget the old row, write the new one; the state is as before when either fails."""
        ...


class FunctionalMemory:
    """`HeldMemory` over a runtime's functions, which give a new state every time."""

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
        without = self._runtime.memory_forget(old_key, old_latent, self.state)
        self.state = self._runtime.memory_write(key, latent, without)


def hold(runtime: Runtime, state: MemoryArrays) -> HeldMemory:
    """`state` in the buffers of a backend that has a `hold_memory` method, else as it is. Never changes `state`."""
    holds = getattr(runtime, "hold_memory", None)
    return FunctionalMemory(runtime, state) if holds is None else holds(state)
