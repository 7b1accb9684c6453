"""`Runtime` on a device: the graphs run there, caches and memory states stay there. Imports no ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from microvlm.backends.arm64.remote_values import DeviceArray, Remote
from microvlm.backends.arm64.worker_link import Link, Transport
from microvlm.backends.graph_runtime import GraphRuntime
from microvlm.generation import GenerationOptions, GenerationResult, MemorySlot, OnToken, Prompt, Timings

KEPT = ("present.", "memory_kv.", "memory_mean_out", "memory_cov_out")
"""Beginnings of the names of outputs that stay on the device."""


class Arm64Runtime(GraphRuntime):
    """One bundle on one device. `settings`: fields of `host.Settings`."""

    def __init__(self, directory: Path, transport: Transport, settings: dict[str, Any]):
        super().__init__(directory)
        self._remote = Remote(Link(transport, directory, settings))

    @property
    def target(self) -> str:
        """As in --target."""
        return self._remote.link.transport.name

    @property
    def device(self) -> dict[str, Any]:
        """See `device.describe`."""
        return self._remote.link.loaded["device"]

    @property
    def kernels(self) -> str:
        """Which code runs the quantised layers there."""
        device = self.device
        return (
            f"{self._remote.link.loaded['kernels']} on {device['cpu']} ({device['machine']}, {self.target})"
        )

    @property
    def threads(self) -> int:
        """Of one operator, there."""
        return self._remote.link.loaded["threads"]

    @property
    def pid(self) -> int | None:
        """Of the worker's process here, or of the program that leads to it."""
        return self._remote.link.pid

    def condition(self) -> dict[str, Any]:
        """See `device.condition`, of the worker; `values` counts the arrays that it keeps."""
        return {key: value for key, value in self._remote.ask("condition").items() if key != "id"}

    def speak(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        memory_slot: MemorySlot,
        on_token: OnToken | None,
        timings: Timings,
    ) -> GenerationResult:
        """`generation.speak` on the device: `timings` gets what its clock says."""
        inputs = (prompt.inputs_embeds, prompt.attention_mask, memory_slot.slot_mask, *memory_slot.slot)
        said = self._remote.speak(inputs, asdict(options), on_token or (lambda row, token: None))
        timings.milliseconds.update(said["timings_ms"])
        return GenerationResult(
            said["tokens"], said["stopped"], timings.milliseconds, memory_slot, said["steps"]
        )

    def open_graph(self, graph: str, model: bytes, folder: str = "onnx") -> None:
        """A graph of one's own, serialised, with weights in a folder of the bundle; `run_graph` runs it."""
        self._remote.open_graph(graph, model, folder)

    def run_graph(
        self, graph: str, feeds: dict[str, Any], outputs: Sequence[str], kept: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Run an opened graph: numpy arrays, or DeviceArrays for the outputs named in `kept`."""
        request = {"graph": graph, "names": list(feeds), "outputs": list(outputs)}
        values = self._remote.run(request, list(feeds.values()), [name in kept for name in outputs])
        return dict(zip(outputs, values, strict=True))

    def _run(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        kept = [name.startswith(KEPT) for name in self.tensor_names(graph)[1]]
        values = self._remote.run({"graph": graph}, inputs, kept)
        return [value if isinstance(value, DeviceArray) else Received(value) for value in values]

    def _state_array(self, value: Any) -> Any:
        # Fetched when it is saved or looked at.
        return value


class Received:
    """An array that was sent, behind the same method as one that was not."""

    def __init__(self, array: np.ndarray):
        self._array = array

    def numpy(self) -> np.ndarray:
        return self._array
