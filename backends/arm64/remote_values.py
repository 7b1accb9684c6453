"""Graphs run on a device, with results that stay there: arrays that are fetched when somebody looks at them.

Every result knows the step that made it: graph, inputs, and the steps that made those. A worker that was lost took its
values with it; the steps of those that are still needed are then done again, on the next worker, in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from microvlm.backends.arm64.frame_arrays import to_array, to_tensor
from microvlm.backends.arm64.frames import Lost, Tensor
from microvlm.backends.arm64.worker_link import Link
from microvlm.errors import UserError

LOSSES = 3
"""Workers that one request may use up."""
T = TypeVar("T")


@dataclass(eq=False)
class Step:
    """One run of a graph."""

    request: dict[str, Any]
    """`graph`, and names for a graph that was opened."""
    inputs: list[Tensor | Output]
    kept: list[bool]
    """Of each output, whether it stays on the device."""
    owners: set[int] = field(default_factory=set)
    """Outputs that a DeviceArray stands for."""
    epoch: int = 0
    numbers: dict[int, int] = field(default_factory=dict)
    """Of each output that is on the device in `epoch`, its number there."""
    fetched: dict[int, Tensor] = field(default_factory=dict)


class Output(NamedTuple):
    """One output of a step."""

    step: Step
    place: int


class DeviceArray(NDArrayOperatorsMixin):
    """A float32 array on a device, or one that came from there. Looks like a numpy array, read-only."""

    dtype = np.dtype(np.float32)

    def __init__(self, remote: Remote, step: Step, index: int, shape: Sequence[int]):
        self.shape = tuple(shape)
        self.output = Output(step, index)
        self._remote = remote
        step.owners.add(index)

    def numpy(self) -> np.ndarray:
        """Fetched once."""
        return self._remote.fetch(self.output)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        return self.numpy()[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.numpy(), dtype) if copy else np.asarray(self.numpy(), dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = [value.numpy() if isinstance(value, DeviceArray) else value for value in inputs]
        return getattr(ufunc, method)(*arrays, **options)

    def __getattr__(self, name: str) -> Any:
        # Underscores are Python's own questions, as in copying; they must not fetch.
        if name.startswith("_") or "output" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.numpy(), name)

    def __del__(self) -> None:
        if "output" in self.__dict__:
            self._remote.disown(self.output)


class Remote:
    """Runs graphs over a link and brings back what a lost worker took along. Methods raise UserError."""

    def __init__(self, link: Link):
        self.link = link
        self._opened: dict[str, tuple[dict[str, Any], tuple[Tensor, ...]]] = {}
        self._opened_epoch = 0
        self._next = 1

    def run(self, request: dict[str, Any], inputs: Sequence[Any], kept: Sequence[bool]) -> list[Any]:
        """One graph -> a DeviceArray for each kept output and an array for each other."""
        step = Step(request, [_input(value) for value in inputs], list(kept))
        shapes, arrays = self._insist(lambda: self._perform(step), step.inputs)
        came = iter(arrays)
        return [
            DeviceArray(self, step, index, shapes[str(step.numbers[index])]) if stays else next(came)
            for index, stays in enumerate(step.kept)
        ]

    def open_graph(self, graph: str, model: bytes, folder: str) -> None:
        """A graph of one's own that `run` can name; its weights are in `folder` of the bundle."""
        tensor = Tensor("uint8", (len(model),), model)
        self._opened[graph] = {"do": "open", "graph": graph, "folder": folder}, (tensor,)
        self._opened_epoch = 0
        self._insist(lambda: None, ())

    def speak(
        self, inputs: Sequence[Any], options: dict[str, Any], on_token: Callable[[int, int], None]
    ) -> dict[str, Any]:
        """The decode loop on the device. Said again after a loss, a token is passed on once."""
        held, told = [_input(value) for value in inputs], 0

        def attempt() -> dict[str, Any]:
            numbers, tensors = self._sent(held)
            heard = 0

            def hear(event: dict[str, Any]) -> None:
                nonlocal heard, told
                heard += 1
                if heard > told:
                    told = heard
                    on_token(*event["token"])

            request = {"do": "speak", "inputs": numbers, "options": options}
            return self.link.call(request, tensors, hear)[0]

        return self._insist(attempt, held)

    def ask(self, what: str) -> dict[str, Any]:
        """A request without values."""
        return self._insist(lambda: self.link.call({"do": what})[0], ())

    def fetch(self, output: Output) -> np.ndarray:
        step, index = output
        if index not in step.fetched:
            request = {"do": "fetch"}
            _, tensors = self._insist(
                lambda: self.link.call({**request, "value": step.numbers[index]}), [output]
            )
            step.fetched[index] = tensors[0]
            if all(index in step.fetched for index, stays in enumerate(step.kept) if stays):
                # Whatever made this is not needed any more.
                step.inputs = []
        array = to_array(step.fetched[index])
        array.flags.writeable = False
        return array

    def disown(self, output: Output) -> None:
        """No DeviceArray stands for `output` any more."""
        output.step.owners.discard(output.place)
        self._release(output)

    def _insist(self, action: Callable[[], T], needed: Iterable[Tensor | Output]) -> T:
        """`action` with the values it needs on the device, again on another worker where one is lost."""
        needed = list(needed)
        for _ in range(LOSSES):
            try:
                if not self.link.is_up:
                    self.link.restore()
                self._open_again()
                self._bring_back([value for value in needed if isinstance(value, Output)])
                return action()
            except Lost:
                self.link.drop()
        raise UserError(
            f"{self.link.transport.name} lost its worker {LOSSES} times over one request: "
            "look at the device's memory and its log."
        )

    def _open_again(self) -> None:
        if self._opened_epoch != self.link.epoch:
            for request, tensors in self._opened.values():
                self.link.call(request, tensors)
            self._opened_epoch = self.link.epoch

    def _bring_back(self, wanted: list[Output]) -> None:
        steps = self._missing_steps(wanted)
        uses = Counter(wanted)
        for step in steps:
            uses.update(value for value in step.inputs if isinstance(value, Output))
        for step in steps:
            self._perform(step)
            outputs = [value for value in step.inputs if isinstance(value, Output)]
            uses.subtract(outputs)
            outputs += [Output(step, index) for index in list(step.numbers)]
            for output in outputs:
                # Only the end of a chain is needed, and a device has no room for its middle.
                if uses[output] == 0 and output.place not in output.step.owners:
                    self._release(output)

    def _missing_steps(self, wanted: list[Output]) -> list[Step]:
        """What has to be done again for `wanted`, each step after those that it builds on."""
        order: dict[int, Step] = {}
        stack = [(output.step, False) for output in wanted if self._is_missing(output)]
        while stack:
            step, ready = stack.pop()
            if id(step) in order:
                continue
            if ready:
                order[id(step)] = step
                continue
            stack.append((step, True))
            stack += [
                (value.step, False)
                for value in step.inputs
                if isinstance(value, Output) and self._is_missing(value)
            ]
        return list(order.values())

    def _is_missing(self, output: Output) -> bool:
        return output.place not in output.step.fetched and not self._is_there(output)

    def _is_there(self, output: Output) -> bool:
        return output.step.epoch == self.link.epoch and output.place in output.step.numbers

    def _perform(self, step: Step) -> tuple[dict[str, list[int]], list[np.ndarray]]:
        numbers, tensors = self._sent(step.inputs)
        step.epoch, step.numbers = self.link.epoch, {}
        for index, stays in enumerate(step.kept):
            if stays:
                step.numbers[index], self._next = self._next, self._next + 1
        keep = [step.numbers.get(index) for index in range(len(step.kept))]
        header, came = self.link.call({"do": "run", "inputs": numbers, "keep": keep, **step.request}, tensors)
        return header["shapes"], [to_array(tensor) for tensor in came]

    def _sent(self, inputs: list[Tensor | Output]) -> tuple[list[int | None], list[Tensor]]:
        """Numbers of what is there, and null with a tensor for the rest."""
        numbers: list[int | None] = []
        tensors: list[Tensor] = []
        for value in inputs:
            if isinstance(value, Output) and self._is_there(value):
                numbers.append(value.step.numbers[value.place])
                continue
            numbers.append(None)
            tensors.append(value.step.fetched[value.place] if isinstance(value, Output) else value)
        return numbers, tensors

    def _release(self, output: Output) -> None:
        if self._is_there(output):
            self.link.free.append(output.step.numbers.pop(output.place))


def _input(value: Any) -> Tensor | Output:
    return value.output if isinstance(value, DeviceArray) else to_tensor(np.asarray(value))
