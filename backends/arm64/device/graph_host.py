"""Graphs and their results on the device: an OrtRuntime, and the values that stay there under the host's numbers.

Importing this imports ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from microvlm.backends.arm64.device_errors import BUNDLE, Damaged
from microvlm.backends.arm64.frame_arrays import to_array, to_tensor
from microvlm.backends.arm64.frames import Tensor
from microvlm.backends.ort import OrtRuntime, run_values
from microvlm.backends.resolve import open_bundle
from microvlm.errors import UserError
from microvlm.generation import GenerationOptions, MemorySlot, Prompt, Timings, speak

FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Settings:
    """How ONNX Runtime works on a device with little memory."""

    threads: int | None = None
    """None: as many as there are cores."""
    allow_spinning: bool = False
    """Idle threads poll instead of sleeping: faster, hotter."""
    arena: bool = False
    """ONNX Runtime keeps what it freed for later, in steps that double: faster, more memory."""
    native: bool | None = None
    """See `OrtBackend.load`."""
    verify: bool | None = None
    """See `open_bundle`."""


class DeviceRuntime(OrtRuntime):
    """An OrtRuntime with a device's settings. Weights stay mapped from the bundle's files."""

    def __init__(self, directory: Path, settings: Settings):
        super().__init__(
            directory, settings.threads, settings.allow_spinning, settings.verify, settings.native
        )
        self._arena = settings.arena

    def session_options(self) -> Any:
        """Without the arena and without the plan that it would be cut by."""
        options = super().session_options()
        options.enable_cpu_mem_arena = self._arena
        options.enable_mem_pattern = self._arena
        return options


class GraphHost:
    """Answers `run`, `fetch`, `open` and `speak`. A value is an array or one of ONNX Runtime's."""

    def __init__(self, bundle: Path, settings: dict[str, Any], send: Callable[[dict[str, Any]], None]):
        """Raises Damaged for a bundle that is not as it was exported."""
        chosen = Settings(**settings)
        try:
            open_bundle(bundle, chosen.verify)
        except UserError as error:
            raise Damaged(str(error), BUNDLE) from None
        self._runtime = DeviceRuntime(bundle, replace(chosen, verify=False))
        self._send = send
        self._values: dict[int, Any] = {}
        self._opened: dict[str, Any] = {}

    @property
    def kernels(self) -> str:
        return self._runtime.kernels

    @property
    def threads(self) -> int:
        return self._runtime.threads

    @property
    def count(self) -> int:
        """Values that are kept."""
        return len(self._values)

    def release(self, numbers: Iterable[int]) -> None:
        """Values that the host needs no more."""
        for number in numbers:
            self._values.pop(number, None)

    def answer(
        self, request: dict[str, Any], tensors: list[Tensor]
    ) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        action = {"run": self._run, "fetch": self._fetch, "open": self._open, "speak": self._speak}
        if request["do"] not in action:
            raise UserError(f"the worker knows no request '{request['do']}'.")
        return action[request["do"]](request, tensors)

    def _run(self, request: dict[str, Any], tensors: list[Tensor]) -> Any:
        """One graph: `inputs` in order, each the number of a kept value or null for the next tensor that came along;
        `keep` gives each output a number, or null to send it."""
        inputs = self._inputs(request["inputs"], tensors)
        graph = request["graph"]
        if graph in self._opened:
            session = self._opened[graph]
            outputs = run_values(
                session, request["names"], [_value(value) for value in inputs], request["outputs"]
            )
        else:
            outputs = self._runtime._run(graph, inputs)
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
        """A graph that came along, whose weights are the bundle's."""
        options = self._runtime.session_options()
        folder = (self._runtime.directory / request["folder"]).resolve()
        options.add_session_config_entry(FOLDER_OF_WEIGHTS, str(folder))
        self._opened[request["graph"]] = onnxruntime.InferenceSession(
            bytes(tensors[0].data), options, providers=["CPUExecutionProvider"]
        )
        return {}, ()

    def _speak(self, request: dict[str, Any], tensors: list[Tensor]) -> Any:
        """The decode loop, here: every token is sent as soon as it is chosen."""
        embeds, mask, slot_mask, *slot = self._inputs(request["inputs"], tensors)
        options = GenerationOptions(
            **{**request["options"], "stop_tokens": tuple(request["options"]["stop_tokens"])}
        )
        made = speak(
            self._runtime,
            Prompt(_array(embeds), _array(mask)),
            options,
            MemorySlot(slot, _array(slot_mask), None),
            lambda row, token: self._send({"event": "token", "token": [row, token]}),
            Timings(),
        )
        return {name: getattr(made, name) for name in ("tokens", "stopped", "steps", "timings_ms")}, ()

    def _inputs(self, numbers: list[int | None], tensors: list[Tensor]) -> list[Any]:
        came = iter(tensors)
        return [to_array(next(came)) if number is None else self._values[number] for number in numbers]


def _array(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.numpy()


def _value(value: Any) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value
