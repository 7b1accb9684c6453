"""`Runtime` by the graphs of a bundle, wherever they run: a subclass says how one graph is run.

What a graph gives is an ONNX Runtime value here or an array on a device; `numpy()` copies it out. Needs numpy alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from microvlm.config import MicroVLMConfig
from microvlm.formats.bundle import open_bundle
from microvlm.runtime import MemoryArrays, MemoryReading

MEMORY_PRIOR = "memory_prior"


class GraphRuntime(ABC):
    """Everything of a `LoadedRuntime` but `_run`."""

    def __init__(self, directory: Path, verify: bool | None = None):
        """`verify`: see `open_bundle`. Raises UserError for a bad bundle."""
        manifest = open_bundle(directory, verify)
        self.directory = directory
        self.config = MicroVLMConfig.load(directory)
        self.fingerprint: str = manifest.get("fingerprint", "")
        self._graphs = manifest["graphs"]

    def graph_path(self, graph: str) -> Path:
        """The ONNX file of a graph of the contract."""
        return self.directory / self._graphs[graph]["file"]

    def tensor_names(self, graph: str) -> tuple[list[str], list[str]]:
        """Names of a graph's inputs and outputs, in contract order."""
        spec = self._graphs[graph]
        inputs, outputs = ([tensor["name"] for tensor in side] for side in (spec["inputs"], spec["outputs"]))
        return inputs, outputs

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
        return [zeros] * (2 * text.num_hidden_layers)

    def memory_prior(self) -> MemoryArrays:
        from safetensors.numpy import load_file

        mean = load_file(self.directory / f"{MEMORY_PRIOR}.safetensors")[MEMORY_PRIOR]
        return MemoryArrays(mean[None].astype(np.float32), np.eye(len(mean), dtype=np.float32)[None])

    def memory_encode(
        self, inputs_embeds: np.ndarray, attention_mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        latent, key = self._run("memory_encode", (inputs_embeds, attention_mask))
        return latent.numpy(), key.numpy()

    def memory_write(self, key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryArrays:
        return MemoryArrays(*map(self._state_array, self._run("memory_write", (key, latent, *state))))

    def memory_forget(self, key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryArrays:
        return MemoryArrays(*map(self._state_array, self._run("memory_forget", (key, latent, *state))))

    def memory_read(self, key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryReading:
        read_latent, scope, residual, *slot = self._run("memory_read", (key, latent, *state))
        return MemoryReading(read_latent.numpy(), scope.numpy(), residual.numpy(), slot)

    @abstractmethod
    def _run(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        """Inputs in contract order, numpy arrays or what a graph gave -> what it gives, in contract order."""

    def _state_array(self, value: Any) -> Any:
        """A memory state's part in the form that callers keep."""
        return value.numpy()
