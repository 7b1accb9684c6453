"""Runs graphs on the device with an OrtRuntime, and keeps results under the numbers that the host gives them.

Importing this module imports ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # noqa: F401  # a worker without it must fail here

from microvlm.backends.arm64.device_errors import BUNDLE, DamagedCopyError
from microvlm.backends.arm64.frame_arrays import to_array, to_tensor
from microvlm.backends.arm64.frames import Tensor
from microvlm.backends.ort import OrtRuntime
from microvlm.errors import UserError
from microvlm.formats.bundle import BundleFiles
from microvlm.generation import GenerationOptions, MemorySlot, Prompt, Timings, speak


@dataclass(frozen=True)
class DeviceSettings:
    """Settings of ONNX Runtime for a device with little memory."""

    threads: int | None = None
    """Threads of one operator; None for the number of cores."""
    allow_spinning: bool = False
    """Idle threads poll instead of sleeping: faster, hotter."""
    arena: bool = False
    """ONNX Runtime keeps freed memory, in steps that double: faster, more memory."""
    native: bool | None = None
    """See `OrtBackend.load`."""
    verify: bool | None = None
    """See `BundleFiles`."""


class DeviceOrtRuntime(OrtRuntime):
    """An OrtRuntime with a device's settings. Weights stay mapped from the bundle's files."""

    def __init__(self, bundle: Path | BundleFiles, settings: DeviceSettings):
        super().__init__(bundle, settings.threads, settings.allow_spinning, settings.verify, settings.native)
        self._arena = settings.arena

    def session_options(self) -> Any:
        """Options without the arena, and without the memory plan that goes with it."""
        options = super().session_options()
        options.enable_cpu_mem_arena = self._arena
        options.enable_mem_pattern = self._arena
        return options


class GraphServer:
    """Answers the requests `run`, `fetch`, `open` and `speak`. A kept value is a numpy array or an OrtValue."""

    def __init__(self, bundle: Path, settings: dict[str, Any], send: Callable[[dict[str, Any]], None]):
        """Open the bundle. Raises DamagedCopyError where it is not as it was exported."""
        device_settings = DeviceSettings(**settings)
        try:
            files = BundleFiles(bundle, device_settings.verify)
        except UserError as error:
            raise DamagedCopyError(str(error), BUNDLE) from None
        self._runtime = DeviceOrtRuntime(files, device_settings)
        self._send = send
        self._values: dict[int, Any] = {}

    @property
    def kernels(self) -> str:
        return self._runtime.kernels

    @property
    def threads(self) -> int:
        return self._runtime.threads

    @property
    def count(self) -> int:
        """Number of values that are kept."""
        return len(self._values)

    def release(self, numbers: Iterable[int]) -> None:
        """Free values that the host does not need any more."""
        for number in numbers:
            self._values.pop(number, None)

    def answer(
        self, request: dict[str, Any], tensors: list[Tensor]
    ) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        actions = {"run": self._run, "fetch": self._fetch, "open": self._open, "speak": self._speak}
        if request["do"] not in actions:
            raise UserError(f"the worker has no request '{request['do']}'.")
        return actions[request["do"]](request, tensors)

    def _run(self, request: dict[str, Any], tensors: list[Tensor]) -> Any:
        """Run one graph.

        `inputs` has, for each input, the number of a kept value or null for the next tensor of the request; `keep` has,
        for each output, the number to keep it under or null to send it.
        """
        inputs = self._inputs(request["inputs"], tensors)
        graph = request["graph"]
        if "names" in request:
            feeds = dict(zip(request["names"], inputs, strict=True))
            outputs = list(self._runtime.run_model(graph, feeds, request["outputs"]).values())
        else:
            outputs = self._runtime.run_graph(graph, inputs)
        sent, shapes = [], {}
        for number, output in zip(request["keep"], outputs, strict=True):
            if number is None:
                sent.append(to_tensor(output.numpy()))
            else:
                self._values[number] = output
                shapes[number] = list(output.shape())
        return {"shapes": shapes}, tuple(sent)

    def _fetch(self, request: dict[str, Any], _: list[Tensor]) -> Any:
        return {}, (to_tensor(_array(self._values[request["value"]])),)

    def _open(self, request: dict[str, Any], tensors: list[Tensor]) -> Any:
        """A model that came along, whose weights are the bundle's."""
        self._runtime.open_model(request["graph"], bytes(tensors[0].data), request["folder"])
        return {}, ()

    def _speak(self, request: dict[str, Any], tensors: list[Tensor]) -> Any:
        """Run the decode loop; every token is sent as soon as it is chosen."""
        embeds, mask, slot_mask, *slot = self._inputs(request["inputs"], tensors)
        options = GenerationOptions(
            **{**request["options"], "stop_tokens": tuple(request["options"]["stop_tokens"] or ())}
        )
        result = speak(
            self._runtime,
            Prompt(_array(embeds), _array(mask)),
            options,
            MemorySlot(slot, _array(slot_mask), None),
            lambda row, token: self._send({"event": "token", "token": [row, token]}),
            Timings(),
        )
        return {name: getattr(result, name) for name in ("tokens", "stopped", "steps", "timings_ms")}, ()

    def _inputs(self, numbers: list[int | None], tensors: list[Tensor]) -> list[Any]:
        received = iter(tensors)
        return [to_array(next(received)) if number is None else self._values[number] for number in numbers]


def _array(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.numpy()
