"""`Runtime` over the graphs of a bundle: a subclass runs one graph, here or on a device. Needs numpy alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from microvlm.config import CONFIG, MicroVLMConfig
from microvlm.errors import UserError
from microvlm.exporters.contract import require_graphs
from microvlm.formats.bundle import BundleFiles
from microvlm.runtime import MemoryArrays, MemoryReading

MEMORY_PRIOR = "memory_prior"
_PRIOR_FILE = f"{MEMORY_PRIOR}.safetensors"
_PRIOR_HEADER_BYTES = 65_536


class GraphRuntime(ABC):
    """Everything of a `LoadedRuntime` but `run_graph`."""

    def __init__(self, bundle: Path | BundleFiles, verify: bool | None = None):
        """A folder is opened with `verify`, for which see `BundleFiles`. Raises UserError for a bad bundle."""
        self.files = bundle if isinstance(bundle, BundleFiles) else BundleFiles(bundle, verify)
        manifest = self.files.manifest
        self.directory = self.files.folder
        self.config = MicroVLMConfig.load(self.directory)
        self.files.require_unchanged([CONFIG])
        self.files.keep_open(_PRIOR_FILE)
        self.fingerprint = manifest.fingerprint
        self._graphs = manifest.graphs
        require_graphs(self.config, manifest.graphs, self.directory)

    @property
    def graphs(self) -> list[str]:
        """Names of the bundle's graphs."""
        return list(self._graphs)

    def graph_path(self, graph: str) -> Path:
        """The ONNX file of a graph."""
        return self.directory / self._graphs[graph].file

    def tensor_names(self, graph: str) -> tuple[list[str], list[str]]:
        """Names of a graph's inputs and outputs, in contract order."""
        spec = self._graphs[graph]
        inputs, outputs = ([tensor.name for tensor in side] for side in (spec.inputs, spec.outputs))
        return inputs, outputs

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        return self._call_graph("vision_encoder", (pixel_values,))[0].numpy()

    def embed_tokens(self, input_ids: np.ndarray) -> np.ndarray:
        return self._call_graph("embed_tokens", (input_ids,))[0].numpy()

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
        logits, *present = self._call_graph("decoder_model_merged", inputs)
        return logits.numpy(), present

    def empty_slot(self, batch: int) -> list[Any]:
        text = self.config.text
        zeros = np.zeros((batch, text.num_key_value_heads, 1, text.head_dim), np.float32)
        return [zeros] * (2 * text.num_hidden_layers)

    def memory_prior(self) -> MemoryArrays:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = self.directory / _PRIOR_FILE
        shape = (self.config.memory.slots, self.config.memory.code_size)
        try:
            mean = load(self.files.read(_PRIOR_FILE, _PRIOR_HEADER_BYTES + 4 * shape[0] * shape[1]))[
                MEMORY_PRIOR
            ]
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise UserError(f"{path} is damaged: copy or export the bundle again.") from None
        if mean.shape != shape or mean.dtype != np.float32:
            raise UserError(
                f"{path} holds {mean.dtype} {list(mean.shape)} where config.json says float32 "
                f"{list(shape)}: they belong to different models."
            )
        return MemoryArrays(mean[None].astype(np.float32), np.eye(len(mean), dtype=np.float32)[None])

    def memory_encode(
        self, inputs_embeds: np.ndarray, attention_mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        latent, key = self._call_graph("memory_encode", (inputs_embeds, attention_mask))
        return latent.numpy(), key.numpy()

    def memory_write(self, key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryArrays:
        return MemoryArrays(*map(self._state_array, self._call_graph("memory_write", (key, latent, *state))))

    def memory_forget(self, key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryArrays:
        return MemoryArrays(*map(self._state_array, self._call_graph("memory_forget", (key, latent, *state))))

    def memory_read(self, key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryReading:
        read_latent, scope, residual, *slot = self._call_graph("memory_read", (key, latent, *state))
        return MemoryReading(read_latent.numpy(), scope.numpy(), residual.numpy(), slot)

    @abstractmethod
    def run_graph(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        """Run one graph: inputs in contract order -> outputs in contract order.

        An input is a numpy array or an output of an earlier call. An output is an `ArrayValue`: ONNX Runtime's value,
        or an array on a device, which `numpy()` copies out.
        """

    def _call_graph(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        """Runs a graph for the methods above; a subclass may run another form of it."""
        return self.run_graph(graph, inputs)

    def _state_array(self, value: Any) -> Any:
        """A part of a memory state in the form that callers keep."""
        return value.numpy()
