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

from microvlm.backends.arm64 import messages
from microvlm.backends.arm64.device_errors import BUNDLE, DamagedCopyError
from microvlm.backends.arm64.frame_arrays import to_array, to_tensor
from microvlm.backends.arm64.frames import Tensor
from microvlm.backends.ort import OrtRuntime
from microvlm.errors import UserError
from microvlm.formats.bundle import BundleFiles
from microvlm.formats.documents import quote
from microvlm.generation import GenerationOptions, MemorySlot, Prompt, Timings, speak

ORIGIN = "a request to the device"


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
        device_settings = messages.parse(settings, DeviceSettings, "the settings of a device")
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
        action = request["do"]
        if action not in actions:
            raise UserError(f"the worker has no request {quote(action)}.")
        return actions[action](request, tensors)

    def _run(self, request: dict[str, Any], tensors: list[Tensor]) -> Any:
        """Run one graph.

        `inputs` has, for each input, the number of a kept value or null for the next tensor of the request; `keep` has,
        for each output, the number to keep it under or null to send it.
        """
        run = messages.parse(request, messages.Run, ORIGIN)
        inputs = self._inputs(run.inputs, tensors)
        if run.names is not None:
            if len(run.names) != len(inputs) or len(run.outputs) != len(run.keep):
                raise UserError(f"{ORIGIN} has other numbers of names than of values: {messages.REMEDY}.")
            feeds = dict(zip(run.names, inputs, strict=True))
            outputs = list(self._runtime.run_model(run.graph, feeds, run.outputs).values())
        else:
            try:
                expected, results = map(len, self._runtime.tensor_names(run.graph))
            except KeyError:
                raise UserError(f"the bundle has no graph {quote(run.graph)}: {messages.REMEDY}.") from None
            if (len(inputs), len(run.keep)) != (expected, results):
                raise UserError(
                    f"{ORIGIN} has {len(inputs)} inputs and {len(run.keep)} outputs for {quote(run.graph)}, which has "
                    f"{expected} and {results}: {messages.REMEDY}."
                )
            outputs = self._runtime.run_graph(run.graph, inputs)
        sent, shapes = [], {}
        for number, output in zip(run.keep, outputs, strict=True):
            if number is None:
                sent.append(to_tensor(output.numpy()))
            else:
                self._values[number] = output
                shapes[number] = list(output.shape())
        return {"shapes": shapes}, tuple(sent)

    def _fetch(self, request: dict[str, Any], _: list[Tensor]) -> Any:
        number = messages.parse(request, messages.Fetch, ORIGIN).value
        return {}, (to_tensor(_array(self._kept(number))),)

    def _open(self, request: dict[str, Any], tensors: list[Tensor]) -> Any:
        """A model that came along, whose weights are the bundle's."""
        opening = messages.parse(request, messages.Open, ORIGIN)
        (model,) = messages.take(tensors, 1, ORIGIN)
        self._runtime.open_model(opening.graph, bytes(model.data), opening.folder)
        return {}, ()

    def _speak(self, request: dict[str, Any], tensors: list[Tensor]) -> Any:
        """Run the decode loop; every token is sent as soon as it is chosen."""
        speaking = messages.parse(request, messages.Speak, ORIGIN)
        inputs = self._inputs(speaking.inputs, tensors)
        if len(inputs) < 3:
            raise UserError(f"{ORIGIN} has {len(inputs)} inputs in place of 3 or more: {messages.REMEDY}.")
        embeds, mask, slot_mask, *slot = inputs
        options = messages.parse(
            {**speaking.options, "stop_tokens": speaking.options.get("stop_tokens") or ()},
            GenerationOptions,
            "the options of an answer",
        )
        result = speak(
            self._runtime,
            Prompt(_array(embeds), _array(mask)),
            options,
            MemorySlot(slot, _array(slot_mask), None),
            lambda row, token: self._send({"event": "token", "token": [row, token]}),
            Timings(),
        )
        names = ("tokens", "stopped", "steps", "timings_ms", "log_probabilities")
        return {name: getattr(result, name) for name in names}, ()

    def _inputs(self, numbers: list[int | None], tensors: list[Tensor]) -> list[Any]:
        received = iter(messages.take(tensors, numbers.count(None), ORIGIN))
        return [to_array(next(received)) if number is None else self._kept(number) for number in numbers]

    def _kept(self, number: int) -> Any:
        if number not in self._values:
            raise UserError(f"{ORIGIN} names the value {number}, which is not here: {messages.REMEDY}.")
        return self._values[number]


def _array(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.numpy()
