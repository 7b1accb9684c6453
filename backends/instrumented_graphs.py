"""A `GraphRuntime` whose quantised layers can be recorded and replayed (`microvlm.runtime.Instrumented`).

Inside `listening`, each of the bundle's graphs is run in a probed form: `exporters.replay.graph_probe`.
"""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from microvlm.backends.graph_runtime import GraphRuntime
from microvlm.errors import UserError
from microvlm.runtime import LayerListener

if TYPE_CHECKING:
    from microvlm.exporters.replay.graph_probe import ProbedGraph


class InstrumentedGraphRuntime(GraphRuntime):
    """Everything of an `Instrumented` runtime but `run_graph`, `open_model` and `run_model`."""

    _listener: LayerListener | None = None
    _probed: dict[str, ProbedGraph] | None = None

    @abstractmethod
    def open_model(self, name: str, model: bytes, folder: str) -> None:
        """Open a serialised ONNX model under a name of its own; its weights are in this folder of the bundle."""

    @abstractmethod
    def run_model(self, name: str, feeds: dict[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """Run an opened model: values as in `run_graph`, by name -> the values of `outputs`, by name."""

    def quantized_layers(self) -> frozenset[str]:
        """See `Instrumented`."""
        if importlib.util.find_spec("onnx") is None:
            raise UserError("opening its layers needs onnx; pip install 'microvlm[bench]'")
        return frozenset(layer.name for graph in self.graphs for layer in self._probe(graph).layers)

    @contextmanager
    def listening(self, listener: LayerListener) -> Iterator[None]:
        """See `Instrumented`."""
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None

    def _call_graph(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        if self._listener is None:
            return self.run_graph(graph, inputs)
        probed = self._probe(graph)
        if not probed.layers:
            return self.run_graph(graph, inputs)
        input_names, output_names = self.tensor_names(graph)
        values = probed.run(
            lambda feeds, outputs: self.run_model(_probed_name(graph), feeds, outputs),
            dict(zip(input_names, inputs, strict=True)),
            self._listener,
        )
        return [values[name] for name in output_names]

    def _probe(self, graph: str) -> ProbedGraph:
        """The graph with its layers opened, ready to run."""
        if self._probed is None:
            self._probed = {}
        if graph not in self._probed:
            from microvlm.exporters.replay.graph_probe import probe

            probed = probe(self.graph_path(graph))
            folder = str(probed.folder.relative_to(self.directory))
            self.open_model(_probed_name(graph), probed.model.SerializeToString(), folder)
            self._probed[graph] = probed
        return self._probed[graph]


def _probed_name(graph: str) -> str:
    return f"{graph}.probed"
