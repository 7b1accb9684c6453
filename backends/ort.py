"""Backend `ort`: a bundle's graphs on ONNX Runtime's CPU provider. Needs neither torch nor onnx.

A session is made when its graph is first used, from the file's path, so that weights stay mapped from the disk. The
operators of `ai.microvlm` run in the native library where this package has one, else by the functions in the graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from microvlm.backends import native as native_library
from microvlm.backends.arm64.device.machine_facts import onnxruntime_refusal
from microvlm.backends.base import Backend, LoadedRuntime
from microvlm.backends.instrumented_graphs import InstrumentedGraphRuntime
from microvlm.backends.ort_memory import OrtMemory
from microvlm.backends.resolve import resolve_bundle
from microvlm.backends.threads import pool_threads
from microvlm.errors import UserError
from microvlm.exporters.replay.model_session import open_session
from microvlm.formats.bundle import BundleFiles
from microvlm.formats.documents import quote
from microvlm.formats.manifest import GraphEntry
from microvlm.runtime import MemoryArrays

_ORT_TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)"}
FUNCTION_BODIES = "function bodies in the graphs"
_STEPS = ("embed_tokens", "decoder_model_merged")
"""Graphs that run once a token; an answer's first run of them has more tokens, and checks their files."""


class OrtBackend(Backend):
    name = "ort"
    libraries = ("onnxruntime",)

    def unavailable(self) -> str | None:
        # Without importing it: a version that this processor cannot run would end the program.
        return onnxruntime_refusal()

    def kernels(self) -> str:
        return _kernels(native_library.library_path())

    def load(
        self,
        source: str | Path,
        threads: int | None = None,
        allow_spinning: bool = False,
        verify: bool | None = None,
        native: bool | None = None,
        **options: Any,
    ) -> LoadedRuntime:
        """`allow_spinning`: threads poll for work between two runs too. `verify`: see `BundleFiles`.

        `native`: True for the native library, False for the graphs' own functions, None for the library if there is
        one. Raises UserError for True without one.
        """
        if options:
            raise UserError(f"backend 'ort' has no option '{next(iter(options))}'.")
        return OrtRuntime(resolve_bundle(source), threads, allow_spinning, verify, native)


class OrtRuntime(InstrumentedGraphRuntime):
    """`Runtime` over the graphs of a bundle. The cache stays in ONNX Runtime's own values."""

    def __init__(
        self,
        bundle: Path | BundleFiles,
        threads: int | None = None,
        allow_spinning: bool = False,
        verify: bool | None = None,
        native: bool | None = None,
    ):
        super().__init__(bundle, verify)
        self.threads = pool_threads(threads, len(self.graphs))
        self.allow_spinning = allow_spinning
        self._native = native
        self._library = None if native is False else native_library.library_path()
        if native and self._library is None:
            raise UserError(
                "there is no native library here: install a wheel that has it, or load without it."
            )
        self.kernels = _kernels(self._library, native is None)
        """Name of the code that runs the quantised layers: `native` and its variant, or `FUNCTION_BODIES`."""
        self._sessions: dict[str, Any] = {}
        self._models: dict[str, Any] = {}

    def with_threads(self, threads: int) -> OrtRuntime:
        """See `microvlm.runtime.ChangesThreads`: another runtime over the same checked files."""
        return OrtRuntime(self.files, threads, self.allow_spinning, native=self._native)

    def session(self, graph: str) -> Any:
        """The InferenceSession of a graph, made on first use. Raises UserError."""
        if graph not in self._sessions:
            self._sessions[graph] = self._open_session(graph)
        return self._sessions[graph]

    def open_ahead(self) -> None:
        """Make the sessions of all graphs. Raises UserError."""
        for graph in self.graphs:
            self.session(graph)

    def session_options(self) -> Any:
        """SessionOptions with explicit threads, no log (errors are raised), and no telemetry."""
        import onnxruntime

        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # Within a run a thread polls for the next operator's work: waking it costs as much as a small product.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", str(int(not self.allow_spinning)))
        if self._library is not None:
            options.register_custom_ops_library(str(self._library))
        return options

    def hold_memory(self, state: MemoryArrays) -> OrtMemory:
        """See `microvlm.runtime.HoldsMemory`."""
        return OrtMemory(self, state)

    def run_bound(self, graph: str, binding: Any) -> None:
        """Run a graph on an IOBinding of its session. Raises UserError."""
        self._guard(graph, lambda session: session.run_with_iobinding(binding))

    def run_graph(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        """See `GraphRuntime`; outputs are ONNX Runtime's values. Raises UserError."""
        names, outputs = self.tensor_names(graph)
        values = [_value(value) for value in inputs]
        is_step = graph in _STEPS and np.shape(inputs[0])[1:2] == (1,)
        return self._guard(graph, lambda session: run_values(session, names, values, outputs), is_step)

    def open_model(self, name: str, model: bytes, folder: str = "onnx") -> None:
        """See `InstrumentedGraphRuntime`."""
        self._models[name] = open_session(model, self.directory / folder, self.session_options())
        self.files.require_unchanged(name for names in self.files.data_files.values() for name in names)

    def run_model(self, name: str, feeds: dict[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """See `InstrumentedGraphRuntime`."""
        values = [_value(value) for value in feeds.values()]
        results = run_values(self._models[name], list(feeds), values, outputs)
        return dict(zip(outputs, results, strict=True))

    def _guard(self, graph: str, action: Callable[[Any], Any], is_step: bool = False) -> Any:
        """Run a graph of files that are as they were when they were checked; a step is not looked at again."""
        session = self.session(graph)
        if not is_step:
            self.files.require_held_unchanged(self._graphs[graph].file)
        try:
            return action(session)
        except Exception as error:  # pybind kinds without a common base of their own
            raise UserError(
                f"{self.graph_path(graph)} failed to run ({_first_line(error)}): export it again."
            ) from error

    def _open_session(self, graph: str) -> Any:
        import onnxruntime

        path, file = self.graph_path(graph), self._graphs[graph].file
        try:
            session = onnxruntime.InferenceSession(
                str(path), self.session_options(), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # as above
            self.files.require_unchanged((file, *self.files.data_files[file]))
            raise UserError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {path} ({_first_line(error)}): "
                "export it again or upgrade onnxruntime."
            ) from error
        _require_tensors(session, self._graphs[graph], path)
        self.files.hold(file)
        return session


def _require_tensors(session: Any, entry: GraphEntry, path: Path) -> None:
    """Raise UserError unless the graph declares the tensors that the manifest lists for it."""
    for listed, declared in ((entry.inputs, session.get_inputs()), (entry.outputs, session.get_outputs())):
        try:
            types = {tensor.name: (tensor.type, tensor.shape) for tensor in declared}
        except UnicodeDecodeError:  # a name or a dimension that is no text
            types = {}
        for tensor in listed:
            kind, shape = types.get(tensor.name, ("", []))
            fits = len(shape) == len(tensor.shape) and all(
                ours == theirs or not (isinstance(ours, int) and isinstance(theirs, int))
                for ours, theirs in zip(tensor.shape, shape, strict=True)
            )
            if kind != _ORT_TYPES.get(tensor.dtype) or not fits:
                raise UserError(
                    f"{path} does not have {quote(tensor.name)} as manifest.json lists it: "
                    "copy or export the bundle again."
                )


def run_values(
    session: Any, names: Sequence[str], values: Sequence[Any], outputs: Sequence[str]
) -> list[Any]:
    """Run a session on ONNX Runtime's values -> its values, as `run_with_ort_values` does, for less.

    `run_with_ort_values` iterates over a C++ vector, whose end is an exception: half a million instructions a call on
    a Cortex-A53, half of the cost of a small graph there.
    """
    bound, wrap, options, cpu = _bindings()
    feeds, results = bound.OrtValueVector(), bound.OrtValueVector()
    for value in values:
        feeds.push_back(value._get_c_value())
    session.run_with_ortvaluevector(options, list(names), feeds, list(outputs), results, [cpu] * len(outputs))
    return [wrap(results[i]) for i in range(len(outputs))]


@functools.cache
def _bindings() -> tuple[Any, Any, Any, Any]:
    """ONNX Runtime's C++ classes, `OrtValue`, run options that nobody changes, and the processor as a device.

    Made once: for every value of every token they are half of the cost in Python.
    """
    import onnxruntime
    from onnxruntime.capi import _pybind_state as bound

    cpu = onnxruntime.OrtDevice.make("cpu", 0)._get_c_device()
    return bound, onnxruntime.OrtValue, onnxruntime.RunOptions(), cpu


def _kernels(library: Path | None, missed: bool = True) -> str:
    """The sentence of `kernels`; `missed`: say why there is no library.

    Raises UserError where MICROVLM_KERNELS forces a variant that cannot run.
    """
    if library is not None:
        return f"native {native_library.active_variant()}"
    reason = native_library.absence() if missed else ""
    return f"{FUNCTION_BODIES} (no native library: {reason})" if reason else FUNCTION_BODIES


def _value(array: Any) -> Any:
    if not isinstance(array, np.ndarray):
        return array
    bound, wrap, _, cpu = _bindings()
    contiguous = np.ascontiguousarray(array)
    # As `OrtValue.ortvalue_from_numpy`: the array stays, because the value lies in its memory.
    return wrap(bound.OrtValue.ortvalue_from_numpy(contiguous, cpu), contiguous)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].strip().rstrip(".")
