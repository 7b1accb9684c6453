"""Record the activation codes of one runtime and run another with them, layer by layer.

A rounding tie makes two right runtimes differ by a whole code, which moves everything after it. With the codes of the
first in both, ties are gone: what still differs is an error. Every layer of the second run first quantises its own
input, is compared with the recording, and is then overruled.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from microvlm.bench.equivalence.recorded_activations import Comparison, Tape, floor_rows
from microvlm.runtime import Runtime


class Instrument(Protocol):
    """A runtime whose quantised layers can be listened to and overruled. `runtime` is the one to call meanwhile."""

    runtime: Runtime

    @property
    def layers(self) -> frozenset[str]: ...

    def recording(self, tape: Tape) -> Any:
        """Context: every call appends to `tape`."""
        ...

    def replaying(self, tape: Tape, comparison: Comparison) -> Any:
        """Context: every call takes its codes from `tape` and is counted in `comparison`."""
        ...


def instrument(runtime: Runtime) -> Instrument | None:
    """An Instrument for a runtime of torch or of ONNX Runtime, here or on a device; None where there is none."""
    if hasattr(runtime, "open_graph"):
        return DeviceInstrument(runtime)
    if hasattr(runtime, "graph_path") and hasattr(runtime, "session_options"):
        return OrtInstrument(runtime)
    if hasattr(runtime, "model"):
        return TorchInstrument(runtime)
    return None


class TorchInstrument:
    """Taps on every packed layer of a TorchRuntime's model."""

    def __init__(self, runtime: Any):
        from microvlm.model.lowering import named_packed

        self.runtime = runtime
        self._layers = named_packed(runtime.model)

    @property
    def layers(self) -> frozenset[str]:
        return frozenset(self._layers)

    @contextmanager
    def recording(self, tape: Tape) -> Iterator[None]:
        with self._hooked(lambda name: _TorchRecorder(name, tape)):
            yield

    @contextmanager
    def replaying(self, tape: Tape, comparison: Comparison) -> Iterator[None]:
        with self._hooked(lambda name: _TorchReplayer(name, tape, comparison)):
            yield

    @contextmanager
    def _hooked(self, listener_of: Any) -> Iterator[None]:
        handles = []
        try:
            for name, layer in self._layers.items():
                listener = listener_of(name)
                layer.tap = listener.tap
                handles.append(layer.register_forward_pre_hook(listener.before))
                if hasattr(layer, "sums_tap"):
                    layer.sums_tap = listener.sums
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in self._layers.values():
                layer.tap = None
                if hasattr(layer, "sums_tap"):
                    layer.sums_tap = None


class _TorchRecorder:
    def __init__(self, name: str, tape: Tape):
        self.name, self.tape = name, tape
        self._codes: np.ndarray | None = None
        self._weight: Any = None

    def before(self, layer: Any, inputs: Any) -> None:
        # A dense layer has no tap on its sums: they are made again from its codes.
        self._weight = layer.weight.float() if layer.kind == "dense" else None

    def tap(self, codes: Any) -> Any:
        self._codes = codes.cpu().numpy()
        if self._weight is not None:
            self.sums(codes @ self._weight.T)
        return codes

    def sums(self, sums: Any) -> None:
        assert self._codes is not None
        self.tape.add(self.name, self._codes, sums.cpu().numpy())


class _TorchReplayer:
    def __init__(self, name: str, tape: Tape, comparison: Comparison):
        self.name, self.tape, self.comparison = name, tape, comparison
        self._x: Any = None
        self._weight: Any = None
        self._entry: Any = None

    def before(self, layer: Any, inputs: Any) -> None:
        self._x = inputs[0].cpu().numpy()
        self._weight = layer.weight.float() if layer.kind == "dense" else None

    def tap(self, codes: Any) -> Any:
        import torch

        self._entry = self.tape.take(self.name, self._x.shape)
        self.comparison.compare_codes(self.name, self._x, self._entry.codes)
        given = torch.from_numpy(self._entry.codes.astype(np.float32)).to(codes.device)
        if self._weight is not None:
            self.sums(given @ self._weight.T)
        return given

    def sums(self, sums: Any) -> None:
        rows = np.ones(self._x.shape[:-1], bool)
        self.comparison.compare_sums(sums.cpu().numpy(), self._entry.sums, rows)


class OrtInstrument:
    """Probed graphs in place of an OrtRuntime's own, with its session options and so with its kernels."""

    def __init__(self, runtime: Any):
        self._original = runtime
        self.runtime = copy.copy(runtime)
        # Every method of the copy runs its graph through here; the original is left as it was.
        self.runtime._run = self._run
        self._graphs: dict[str, tuple[Any, Any]] = {}
        self._tape: Tape | None = None
        self._comparison: Comparison | None = None

    @property
    def layers(self) -> frozenset[str]:
        names = (layer.name for graph in self._original._graphs for layer in self._probed(graph)[0].layers)
        return frozenset(names)

    @contextmanager
    def recording(self, tape: Tape) -> Iterator[None]:
        self._tape, self._comparison = tape, None
        try:
            yield
        finally:
            self._tape = None

    @contextmanager
    def replaying(self, tape: Tape, comparison: Comparison) -> Iterator[None]:
        self._tape, self._comparison = tape, comparison
        try:
            yield
        finally:
            self._tape = self._comparison = None

    def _probed(self, graph: str) -> tuple[Any, Any]:
        if graph not in self._graphs:
            from microvlm.bench.equivalence.graph_probe import probe

            probed = probe(self._original.graph_path(graph))
            self._graphs[graph] = probed, self._open(graph, probed)
        return self._graphs[graph]

    def _open(self, graph: str, probed: Any) -> Any:
        """What runs a probed graph: (names of outputs, feeds) -> {name: value}."""
        session = probed.open(self._original.session_options())

        def run(outputs: Sequence[str], feeds: dict[str, Any]) -> dict[str, Any]:
            values = {name: _value(value) for name, value in feeds.items()}
            return dict(zip(outputs, session.run_with_ort_values(list(outputs), values), strict=True))

        return run

    def _array(self, value: Any) -> np.ndarray:
        return value if isinstance(value, np.ndarray) else value.numpy()

    def _result(self, value: Any) -> Any:
        """An output as the runtime gives it."""
        return value

    def _run(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        probed, run = self._probed(graph)
        if self._tape is None or not probed.layers:
            return self._original._run(graph, inputs)
        spec = self._original._graphs[graph]
        names = [tensor["name"] for tensor in spec["inputs"]]
        feeds = dict(zip(names, inputs, strict=True))
        entries = self._take(probed)
        feeds |= self._given(probed, entries)
        outputs = run(probed.outputs, feeds)
        arrays = {name: self._array(outputs.get(name, feeds.get(name))) for name in _seen(probed)}
        for layer in probed.layers:
            self._listen(layer, arrays, entries.get(layer.name))
        return [self._result(outputs[tensor["name"]]) for tensor in spec["outputs"]]

    def _take(self, probed: Any) -> dict[str, Any]:
        if self._comparison is None:
            return {}
        assert self._tape is not None
        return {layer.name: self._tape.take(layer.name) for layer in probed.layers}

    def _given(self, probed: Any, entries: dict[str, Any]) -> dict[str, Any]:
        from microvlm.bench.equivalence.graph_probe import REPLAY

        nothing = np.zeros(1, np.int8)
        given = {layer.codes: entries[layer.name].codes if entries else nothing for layer in probed.layers}
        return {REPLAY: np.asarray(bool(entries)), **given}

    def _listen(self, layer: Any, arrays: dict[str, np.ndarray], entry: Any) -> None:
        x, sums = arrays[layer.x], arrays[layer.sums]
        if entry is None:
            from microvlm.formats.op_spec import quantize_activations

            assert self._tape is not None
            self._tape.add(layer.name, quantize_activations(x)[0], sums)
            return
        comparison = self._comparison
        assert comparison is not None
        above = floor_rows(x)
        equal = comparison.compare_codes(layer.name, x, entry.codes)
        comparison.compare_sums(sums, entry.sums, above)
        if layer.direct:
            comparison.compare_operator(arrays[layer.direct], arrays[layer.scaled], equal & above)


class DeviceInstrument(OrtInstrument):
    """Probed graphs on the device of an `ort-arm64` runtime: codes and sums travel, caches and weights stay there."""

    def _open(self, graph: str, probed: Any) -> Any:
        from microvlm.backends.arm64.device_runtime import KEPT_PREFIXES

        name = f"{graph}.probed"
        self._original.open_graph(name, probed.model.SerializeToString())
        kept = [output for output in probed.outputs if output.startswith(KEPT_PREFIXES)]

        def run(outputs: Sequence[str], feeds: dict[str, Any]) -> dict[str, Any]:
            return self._original.run_graph(name, feeds, outputs, kept)

        return run

    def _result(self, value: Any) -> Any:
        return _Received(value) if isinstance(value, np.ndarray) else value


class _Received:
    """An array behind the method of a value that stayed on the device."""

    def __init__(self, array: np.ndarray):
        self._array = array

    def numpy(self) -> np.ndarray:
        return self._array


def _seen(probed: Any) -> list[str]:
    return list({name for layer in probed.layers for name in layer.outputs})


def _value(array: Any) -> Any:
    import onnxruntime

    if not isinstance(array, np.ndarray):
        return array
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
