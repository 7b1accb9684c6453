"""A memory state that is changed in place: in a backend's own buffers, or by the functions of `Runtime`.

Those functions take a state and return a new one; a backend with buffers of its own saves that copy.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from microvlm.runtime import MemoryArrays, Runtime


class HeldMemory(Protocol):
    """A mutable memory state, as `hold_memory(state)` of a backend returns it: keys [B, K], latents [B, C], float32."""

    @property
    def state(self) -> MemoryArrays:
        """The current state, not a copy: a later operation may change the arrays."""
        ...

    def snapshot(self) -> MemoryArrays:
        """A copy of the state, which no later operation changes."""
        ...

    def write(self, key: np.ndarray, latent: np.ndarray) -> None: ...

    def forget(self, key: np.ndarray, latent: np.ndarray) -> None: ...

    def overwrite(
        self, old_key: np.ndarray, old_latent: np.ndarray, key: np.ndarray, latent: np.ndarray
    ) -> None:
        """Forget the old row and write the new one. The state is unchanged when either fails."""
        ...


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
    """Hold `state` in the backend's buffers if it has `hold_memory`, else in a `FunctionalMemory`.

    The arrays of `state` are never changed.
    """
    hold_memory = getattr(runtime, "hold_memory", None)
    return FunctionalMemory(runtime, state) if hold_memory is None else hold_memory(state)
