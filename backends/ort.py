"""Backend `ort`: a bundle's graphs on ONNX Runtime's CPU provider. Needs neither torch nor onnx.

A session is made when its graph is first used, from the file's path, so that weights stay mapped from the disk. The
operators of `ai.microvlm` run in the native library where this package has one, else by the functions in the graphs.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from microvlm.backends import native as native_library
from microvlm.backends.base import Backend, LoadedRuntime
from microvlm.backends.ort_memory import OrtMemory
from microvlm.backends.resolve import open_bundle, resolve_bundle
from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.runtime import MemoryArrays, MemoryReading

MINIMUM_VERSION = (1, 25)
MEMORY_PRIOR = "memory_prior"
FUNCTION_BODIES = "function bodies in the graphs"


class OrtBackend(Backend):
    name = "ort"

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("onnxruntime") is None:
            return "onnxruntime is not installed; pip install onnxruntime."
        import onnxruntime

        version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
        if version < MINIMUM_VERSION:
            return f"onnxruntime {onnxruntime.__version__} is too old; pip install 'onnxruntime>=1.25'."
        return None

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
        """`allow_spinning`: idle threads poll for work instead of sleeping. `verify`: see `open_bundle`.

        `native`: True for the native library, False for the graphs' own functions, None for the library if there is
        one. Raises UserError for True without one.
        """
        if options:
            raise UserError(f"backend 'ort' has no option '{next(iter(options))}'.")
        return OrtRuntime(resolve_bundle(source), threads, allow_spinning, verify, native)


class OrtRuntime:
    """`Runtime` over the graphs of a bundle. The cache stays in ONNX Runtime's own values."""

    def __init__(
        self,
        directory: Path,
        threads: int | None = None,
        allow_spinning: bool = False,
        verify: bool | None = None,
        native: bool | None = None,
    ):
        manifest = open_bundle(directory, verify)
        self.directory = directory
        self.config = MicroVLMConfig.load(directory)
        self.fingerprint: str = manifest.get("fingerprint", "")
        self.threads = threads or usable_cores()
        self.allow_spinning = allow_spinning
        self._library = None if native is False else native_library.library_path()
        if native and self._library is None:
            raise UserError(
                "there is no native library here: install a wheel that has it, or load without it."
            )
        self.kernels = _kernels(self._library, native is None)
        """Which code runs the quantised layers: `native` and its variant, or `FUNCTION_BODIES`."""
        self._graphs: dict[str, dict[str, Any]] = manifest["graphs"]
        self._sessions: dict[str, Any] = {}

    def graph_path(self, graph: str) -> Path:
        """The ONNX file of a graph of the contract."""
        return self.directory / self._graphs[graph]["file"]

    def session(self, graph: str) -> Any:
        """The InferenceSession of a graph, made on first use. Raises UserError."""
        if graph not in self._sessions:
            self._sessions[graph] = self._open_session(graph)
        return self._sessions[graph]

    def session_options(self) -> Any:
        """Threads are explicit, and ONNX Runtime's own log is silent: its errors are raised."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.allow_spinning)))
        if self._library is not None:
            options.register_custom_ops_library(str(self._library))
        return options

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        return self._run("vision_encoder", (pixel_values,))[0].numpy()

    def embed_tokens(self, input_ids: np.ndarray) -> np.ndarray:
        return self._run("embed_tokens", (input_ids,))[0].numpy()

    def decode(
        self,
        inputs_embeds: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        past: list[Any],
        num_logits_to_keep: int = 1,
    ) -> tuple[np.ndarray, list[Any]]:
        keep = np.asarray(num_logits_to_keep, np.int64)
        inputs = (inputs_embeds, attention_mask, position_ids, keep, *past)
        logits, *present = self._run("decoder_model_merged", inputs)
        return logits.numpy(), present

    def empty_slot(self, batch: int) -> list[Any]:
        text = self.config.text
        zeros = np.zeros((batch, text.num_key_value_heads, 1, text.head_dim), np.float32)
        return [_value(zeros)] * (2 * text.num_hidden_layers)

    def memory_prior(self) -> MemoryArrays:
        from safetensors.numpy import load_file

        mean = load_file(self.directory / f"{MEMORY_PRIOR}.safetensors")[MEMORY_PRIOR]
        return MemoryArrays(mean[None].astype(np.float32), np.eye(len(mean), dtype=np.float32)[None])

    def memory_encode(
        self, inputs_embeds: np.ndarray, attention_mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        code, key = self._run("memory_encode", (inputs_embeds, attention_mask))
        return code.numpy(), key.numpy()

    def memory_write(self, key: np.ndarray, code: np.ndarray, state: MemoryArrays) -> MemoryArrays:
        return MemoryArrays(*(part.numpy() for part in self._run("memory_write", (key, code, *state))))

    def memory_forget(self, key: np.ndarray, code: np.ndarray, state: MemoryArrays) -> MemoryArrays:
        return MemoryArrays(*(part.numpy() for part in self._run("memory_forget", (key, code, *state))))

    def memory_read(self, key: np.ndarray, code: np.ndarray, state: MemoryArrays) -> MemoryReading:
        recalled, scope, residual, *slot = self._run("memory_read", (key, code, *state))
        return MemoryReading(recalled.numpy(), scope.numpy(), residual.numpy(), slot)

    def hold_memory(self, state: MemoryArrays) -> OrtMemory:
        """`state` in buffers of its own, where writing and forgetting copy nothing."""
        return OrtMemory(self, state)

    def tensor_names(self, graph: str) -> tuple[list[str], list[str]]:
        """Names of a graph's inputs and outputs, in contract order."""
        spec = self._graphs[graph]
        inputs, outputs = ([tensor["name"] for tensor in spec[side]] for side in ("inputs", "outputs"))
        return inputs, outputs

    def run_bound(self, graph: str, binding: Any) -> None:
        """Run a graph on an IOBinding of its session. Raises UserError."""
        self._guard(graph, lambda session: session.run_with_iobinding(binding))

    def _run(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        """Inputs in contract order, numpy arrays or ONNX Runtime's values -> its values, in contract order."""
        names, outputs = self.tensor_names(graph)
        feeds = {name: _value(value) for name, value in zip(names, inputs, strict=True)}
        return self._guard(graph, lambda session: session.run_with_ort_values(outputs, feeds))

    def _guard(self, graph: str, action: Callable[[Any], Any]) -> Any:
        session = self.session(graph)
        try:
            return action(session)
        except Exception as error:  # pybind kinds without a common base of their own
            raise UserError(
                f"{self.graph_path(graph)} failed to run ({_first_line(error)}): export it again."
            ) from error

    def _open_session(self, graph: str) -> Any:
        import onnxruntime

        path = self.graph_path(graph)
        try:
            return onnxruntime.InferenceSession(
                str(path), self.session_options(), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # as above
            raise UserError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {path} ({_first_line(error)}): "
                "export it again or upgrade onnxruntime."
            ) from error


def usable_cores() -> int:
    """Cores that this process may run on, where the system tells; else all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _kernels(library: Path | None, missed: bool = True) -> str:
    """`missed`: nobody asked to go without. Raises UserError where MICROVLM_KERNELS forces what can't run."""
    if library is not None:
        return f"native {native_library.active_variant()}"
    reason = native_library.absence() if missed else ""
    return f"{FUNCTION_BODIES} (no native library: {reason})" if reason else FUNCTION_BODIES


def _value(array: Any) -> Any:
    import onnxruntime

    if not isinstance(array, np.ndarray):
        return array
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].strip().rstrip(".")
