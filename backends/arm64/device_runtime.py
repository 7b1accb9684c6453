"""The `Runtime` whose graphs, caches and memory states are on a device. Imports no ONNX Runtime here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from microvlm.backends.arm64.remote_values import DeviceArray, RemoteGraphs
from microvlm.backends.arm64.worker_link import Transport, WorkerLink
from microvlm.backends.instrumented_graphs import InstrumentedGraphRuntime
from microvlm.escaping import printable
from microvlm.generation import GenerationOptions, GenerationResult, MemorySlot, OnToken, Prompt, Timings

KEPT_PREFIXES = ("present.", "memory_kv.", "memory_mean_out", "memory_cov_out")
"""Prefixes of the names of outputs that stay on the device."""


class Arm64Runtime(InstrumentedGraphRuntime):
    """One bundle on one device. `settings`: fields of `host.DeviceSettings`."""

    def __init__(self, directory: Path, transport: Transport, settings: dict[str, Any]):
        super().__init__(directory)
        self._remote_graphs = RemoteGraphs(WorkerLink(transport, directory, settings))

    @property
    def target(self) -> str:
        """The target as the user types it after --target."""
        return self._remote_graphs.link.transport.name

    @property
    def device(self) -> dict[str, Any]:
        """The device's facts: see `machine_facts.describe`."""
        facts: dict[str, Any] = msgspec.to_builtins(self._remote_graphs.link.loaded.device)
        return facts

    @property
    def kernels(self) -> str:
        """The code that runs the quantised layers on the device."""
        loaded = self._remote_graphs.link.loaded
        return printable(f"{loaded.kernels} on {loaded.device.cpu} ({loaded.device.machine}, {self.target})")

    @property
    def threads(self) -> int:
        """Threads of one operator on the device."""
        return self._remote_graphs.link.loaded.threads

    @property
    def pid(self) -> int | None:
        """Process id, on the host, of the worker or of the program (ssh, QEMU) that leads to it."""
        return self._remote_graphs.link.pid

    def condition(self) -> dict[str, Any]:
        """The worker's state: see `machine_facts.condition`; `values` counts the arrays that it keeps."""
        return self._remote_graphs.condition()

    def speak(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        memory_slot: MemorySlot,
        on_token: OnToken | None,
        timings: Timings,
    ) -> GenerationResult:
        """`generation.speak` on the device; `timings` is filled from the device's clock."""
        inputs = (prompt.inputs_embeds, prompt.attention_mask, memory_slot.slot_mask, *memory_slot.slot)
        result = self._remote_graphs.speak(inputs, asdict(options), on_token or (lambda row, token: None))
        timings.milliseconds.update(result.timings_ms)
        return GenerationResult(
            result.tokens,
            result.stopped,
            timings.milliseconds,
            memory_slot,
            result.steps,
            result.log_probabilities,
        )

    def run_graph(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        """See `GraphRuntime`; outputs are DeviceArrays where they stay on the device."""
        return self._run({"graph": graph}, inputs, self.tensor_names(graph)[1])

    def open_model(self, name: str, model: bytes, folder: str = "onnx") -> None:
        """See `InstrumentedGraphRuntime`: the model runs on the device."""
        self._remote_graphs.open_graph(name, model, folder)

    def run_model(self, name: str, feeds: dict[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """See `InstrumentedGraphRuntime`; outputs are DeviceArrays where they stay on the device."""
        request = {"graph": name, "names": list(feeds), "outputs": list(outputs)}
        return dict(zip(outputs, self._run(request, list(feeds.values()), outputs), strict=True))

    def _run(self, request: dict[str, Any], inputs: Sequence[Any], outputs: Sequence[str]) -> list[Any]:
        values = self._remote_graphs.run(
            request, inputs, [name.startswith(KEPT_PREFIXES) for name in outputs]
        )
        return [value if isinstance(value, DeviceArray) else ReceivedArray(value) for value in values]

    def _state_array(self, value: Any) -> Any:
        # A DeviceArray is fetched when it is saved or read.
        return value


class ReceivedArray:
    """An array that came with the answer; has the `numpy` method of a DeviceArray."""

    def __init__(self, array: np.ndarray):
        self._array = array

    def numpy(self) -> np.ndarray:
        return self._array
