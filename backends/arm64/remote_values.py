"""Runs graphs on a device and leaves results there: a DeviceArray is fetched when its values are read.

Every result knows the run that made it: the graph, the inputs, and the runs that made those. When a worker is lost, its
values are lost too. The runs of values that are still needed are then repeated on the next worker, in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from microvlm.backends.arm64 import messages
from microvlm.backends.arm64.frame_arrays import to_array, to_tensor
from microvlm.backends.arm64.frames import ConnectionLost, Tensor
from microvlm.backends.arm64.worker_link import WorkerLink
from microvlm.errors import UserError

LOSSES = 3
"""Most workers that may be lost over one request."""
T = TypeVar("T")


@dataclass(eq=False)
class GraphRun:
    """One run of a graph."""

    request: dict[str, Any]
    """`graph`, and input and output names where the graph was opened by `open_graph`."""
    inputs: list[Tensor | RunOutput]
    stays_on_device: list[bool]
    """Whether each output stays on the device."""
    owners: set[int] = field(default_factory=set)
    """Indices of outputs that a DeviceArray refers to."""
    epoch: int = 0
    numbers: dict[int, int] = field(default_factory=dict)
    """Index of an output that is on the device in `epoch` -> its number there."""
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Index of an output that stays on the device -> its shape."""
    fetched: dict[int, Tensor] = field(default_factory=dict)


class RunOutput(NamedTuple):
    """One output of a run."""

    run: GraphRun
    position: int


class DeviceArray(NDArrayOperatorsMixin):
    """A float32 array on a device, fetched when it is read. Behaves like a read-only numpy array."""

    dtype = np.dtype(np.float32)

    def __init__(self, remote: RemoteGraphs, run: GraphRun, index: int, shape: Sequence[int]):
        self.shape = tuple(shape)
        self.output = RunOutput(run, index)
        self._remote = remote
        run.owners.add(index)

    def numpy(self) -> np.ndarray:
        """The values, fetched once."""
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
        # Python looks up names with underscores itself, as in copying; that must not fetch.
        if name.startswith("_") or "output" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.numpy(), name)

    def __del__(self) -> None:
        if "output" in self.__dict__:
            self._remote.disown(self.output)


class RemoteGraphs:
    """Runs graphs over a WorkerLink and restores the values of a lost worker. Methods raise UserError."""

    def __init__(self, link: WorkerLink):
        self.link = link
        self._opened: dict[str, tuple[dict[str, Any], tuple[Tensor, ...]]] = {}
        self._opened_epoch = 0
        self._next = 1

    def run(
        self, request: dict[str, Any], inputs: Sequence[Any], stays_on_device: Sequence[bool]
    ) -> list[Any]:
        """Run one graph -> a DeviceArray for each kept output, a numpy array for every other output."""
        run = GraphRun(request, [_input(value) for value in inputs], list(stays_on_device))
        arrays = self._retry(lambda: self._perform(run), run.inputs)
        received = iter(arrays)
        return [
            DeviceArray(self, run, index, run.shapes[index]) if stays else next(received)
            for index, stays in enumerate(run.stays_on_device)
        ]

    def open_graph(self, graph: str, model: bytes, folder: str) -> None:
        """Open another graph, serialised, which `run` can name; its weights are in `folder` of the bundle."""
        tensor = Tensor("uint8", (len(model),), model)
        self._opened[graph] = {"do": "open", "graph": graph, "folder": folder}, (tensor,)
        self._opened_epoch = 0
        self._retry(lambda: None, ())

    def speak(
        self, inputs: Sequence[Any], options: dict[str, Any], on_token: Callable[[int, int], None]
    ) -> messages.Spoken:
        """Run the decode loop on the device. `on_token` gets every token once, even where a loss repeats the loop."""
        sources, passed_on = [_input(value) for value in inputs], 0

        def attempt() -> messages.Spoken:
            numbers, tensors = self._arguments(sources)
            received = 0

            def pass_on(event: dict[str, Any]) -> None:
                nonlocal received, passed_on
                received += 1
                if received > passed_on:
                    passed_on = received
                    on_token(*messages.parse(event, messages.TokenEvent, self.link.origin).token)

            request = {"do": "speak", "inputs": numbers, "options": options}
            answer, _ = self.link.call(request, tensors, pass_on)
            return messages.parse(answer, messages.Spoken, self.link.origin)

        return self._retry(attempt, sources)

    def condition(self) -> dict[str, int | float | str | None]:
        """The worker's state: see `machine_facts.condition`."""
        answer = self._retry(lambda: self.link.call({"do": "condition"})[0], ())
        figures = {key: value for key, value in answer.items() if key != "id"}
        return messages.parse(figures, dict[str, int | float | str | None], self.link.origin)

    def fetch(self, output: RunOutput) -> np.ndarray:
        """Copy an output from the device, once -> read-only array."""
        run, index = output
        if index not in run.fetched:
            request = {"do": "fetch"}
            _, tensors = self._retry(
                lambda: self.link.call({**request, "value": run.numbers[index]}), [output]
            )
            (tensor,) = messages.take(tensors, 1, self.link.origin)
            if (tensor.dtype, tensor.shape) != (DeviceArray.dtype.name, run.shapes[index]):
                raise UserError(
                    f"{self.link.origin}: an array has become {tensor.dtype} of another shape: {messages.REMEDY}."
                )
            run.fetched[index] = tensor
            if all(index in run.fetched for index, stays in enumerate(run.stays_on_device) if stays):
                # The inputs of this run are not needed any more.
                run.inputs = []
        array = to_array(run.fetched[index])
        array.flags.writeable = False
        return array

    def disown(self, output: RunOutput) -> None:
        """Forget an output to which no DeviceArray refers any more."""
        output.run.owners.discard(output.position)
        self._release(output)

    def _retry(self, action: Callable[[], T], needed: Iterable[Tensor | RunOutput]) -> T:
        """Run `action` with the `needed` values on the device; repeat on another worker where one is lost."""
        needed = list(needed)
        for _ in range(LOSSES):
            try:
                if not self.link.is_up:
                    self.link.restore()
                self._reopen_graphs()
                self._restore([value for value in needed if isinstance(value, RunOutput)])
                return action()
            except ConnectionLost:
                self.link.drop()
        raise UserError(
            f"{self.link.transport.name} lost its worker {LOSSES} times over one request: "
            "look at the device's memory and its log."
        )

    def _reopen_graphs(self) -> None:
        if self._opened_epoch != self.link.epoch:
            for request, tensors in self._opened.values():
                self.link.call(request, tensors)
            self._opened_epoch = self.link.epoch

    def _restore(self, outputs: list[RunOutput]) -> None:
        runs = self._missing_runs(outputs)
        uses = Counter(outputs)
        for run in runs:
            uses.update(value for value in run.inputs if isinstance(value, RunOutput))
        for run in runs:
            self._perform(run)
            finished = [value for value in run.inputs if isinstance(value, RunOutput)]
            uses.subtract(finished)
            finished += [RunOutput(run, index) for index in list(run.numbers)]
            for output in finished:
                # Only the end of a chain is needed; a device may have no room for its middle.
                if uses[output] == 0 and output.position not in output.run.owners:
                    self._release(output)

    def _missing_runs(self, outputs: list[RunOutput]) -> list[GraphRun]:
        """The runs to repeat for `outputs`, each after those that it depends on."""
        order: dict[int, GraphRun] = {}
        stack = [(output.run, False) for output in outputs if self._is_missing(output)]
        while stack:
            run, ready = stack.pop()
            if id(run) in order:
                continue
            if ready:
                order[id(run)] = run
                continue
            stack.append((run, True))
            stack += [
                (value.run, False)
                for value in run.inputs
                if isinstance(value, RunOutput) and self._is_missing(value)
            ]
        return list(order.values())

    def _is_missing(self, output: RunOutput) -> bool:
        return output.position not in output.run.fetched and not self._is_on_device(output)

    def _is_on_device(self, output: RunOutput) -> bool:
        return output.run.epoch == self.link.epoch and output.position in output.run.numbers

    def _perform(self, run: GraphRun) -> list[np.ndarray]:
        """Run on the present worker -> the outputs that do not stay there."""
        numbers, tensors = self._arguments(run.inputs)
        run.epoch, run.numbers = self.link.epoch, {}
        for index, stays in enumerate(run.stays_on_device):
            if stays:
                run.numbers[index], self._next = self._next, self._next + 1
        keep = [run.numbers.get(index) for index in range(len(run.stays_on_device))]
        header, results = self.link.call(
            {"do": "run", "inputs": numbers, "keep": keep, **run.request}, tensors
        )
        shapes = messages.parse(header, messages.Shapes, self.link.origin).shapes
        missing = [number for number in run.numbers.values() if str(number) not in shapes]
        if missing:
            raise UserError(f"{self.link.origin} lacks {len(missing)} shapes: {messages.REMEDY}.")
        run.shapes = {index: tuple(shapes[str(number)]) for index, number in run.numbers.items()}
        messages.take(results, run.stays_on_device.count(False), self.link.origin)
        return [to_array(tensor) for tensor in results]

    def _arguments(self, inputs: list[Tensor | RunOutput]) -> tuple[list[int | None], list[Tensor]]:
        """Returns each input's number on the device (None if it must be sent), and the tensors to send."""
        numbers: list[int | None] = []
        tensors: list[Tensor] = []
        for value in inputs:
            if isinstance(value, RunOutput) and self._is_on_device(value):
                numbers.append(value.run.numbers[value.position])
                continue
            numbers.append(None)
            tensors.append(value.run.fetched[value.position] if isinstance(value, RunOutput) else value)
        return numbers, tensors

    def _release(self, output: RunOutput) -> None:
        if self._is_on_device(output):
            self.link.free.append(output.run.numbers.pop(output.position))


def _input(value: Any) -> Tensor | RunOutput:
    return value.output if isinstance(value, DeviceArray) else to_tensor(np.asarray(value))
