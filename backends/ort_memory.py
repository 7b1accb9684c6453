"""A memory state in ONNX Runtime: two pairs of buffers. A step reads one pair and writes the other, by IOBinding.

No step copies or allocates a state. The buffers are numpy arrays that ONNX Runtime's values share. Overwriting takes
two steps and a third pair, which its first use allocates: the old state is whole until both steps are done.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from microvlm.runtime import MemoryArrays, MemoryReading


class BoundGraphs(Protocol):
    """The part of `OrtRuntime` that a memory state uses."""

    def session(self, graph: str) -> Any: ...

    def tensor_names(self, graph: str) -> tuple[list[str], list[str]]: ...

    def run_bound(self, graph: str, binding: Any) -> None: ...

    def memory_read(self, key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryReading: ...


class OrtMemory:
    """A `HeldMemory`: a state of batch B, changed in place; keys [B, K], latents [B, C], float32."""

    def __init__(self, runtime: BoundGraphs, state: MemoryArrays):
        """Starts with a copy of `state`."""
        self._runtime = runtime
        self._buffers = [MemoryArrays(*(np.array(part, np.float32, order="C") for part in state))]
        self._values = [tuple(_shared(part) for part in self._buffers[0])]
        self._add_pair()
        self._present = 0

    @property
    def state(self) -> MemoryArrays:
        """The present state, without a copy; the step after next overwrites it."""
        return self._buffers[self._present]

    def snapshot(self) -> MemoryArrays:
        """A copy of the state."""
        return MemoryArrays(*(part.copy() for part in self.state))

    def write(self, key: np.ndarray, latent: np.ndarray) -> None:
        """See `Runtime.memory_write`."""
        self._present = self._step("memory_write", key, latent, self._present)

    def forget(self, key: np.ndarray, latent: np.ndarray) -> None:
        """See `Runtime.memory_forget`."""
        self._present = self._step("memory_forget", key, latent, self._present)

    def overwrite(
        self, old_key: np.ndarray, old_latent: np.ndarray, key: np.ndarray, latent: np.ndarray
    ) -> None:
        """Forget the old row and write the new one; the state is as before when either fails."""
        if len(self._buffers) == 2:
            self._add_pair()
        self._present = self._step(
            "memory_write", key, latent, self._step("memory_forget", old_key, old_latent, self._present)
        )

    def read(self, key: np.ndarray, latent: np.ndarray) -> MemoryReading:
        """See `Runtime.memory_read`."""
        return self._runtime.memory_read(key, latent, MemoryArrays(*self._values[self._present]))

    def _step(self, graph: str, key: np.ndarray, latent: np.ndarray, source: int) -> int:
        """Runs a graph from the pair `source` into the next one, whose number is returned."""
        target = (source + 1) % len(self._buffers)
        binding = self._runtime.session(graph).io_binding()
        input_names, output_names = self._runtime.tensor_names(graph)
        # Kept in a variable until the run is over: a value does not keep its array alive for ONNX Runtime.
        row = [_shared(np.ascontiguousarray(part, np.float32)) for part in (key, latent)]
        for name, value in zip(input_names, (*row, *self._values[source]), strict=True):
            binding.bind_ortvalue_input(name, value)
        for name, value in zip(output_names, self._values[target], strict=True):
            binding.bind_ortvalue_output(name, value)
        self._runtime.run_bound(graph, binding)
        return target

    def _add_pair(self) -> None:
        self._buffers.append(MemoryArrays(*(np.empty_like(part) for part in self._buffers[0])))
        self._values.append(tuple(_shared(part) for part in self._buffers[-1]))


def _shared(array: np.ndarray) -> Any:
    """A value of ONNX Runtime over the array's own memory."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
