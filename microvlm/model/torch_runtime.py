"""`Runtime` over the PyTorch model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from microvlm.formats.op_spec import ABSMAX_FLOOR, Q8_MAX
from microvlm.model.decoder import Cache
from microvlm.model.lowering import named_packed
from microvlm.runtime import LayerCall, LayerListener, MemoryArrays, MemoryReading

if TYPE_CHECKING:
    from microvlm.model.microvlm import MicroVLM

_KEPT_AT_EVERY_WIDTH = (
    "adapter.queries",
    "vision.position_embeddings",
    "memory_prior",
    "memory_encoder.pool",
)
"""Trained tensors that lowering never touches: the same bytes in a checkpoint and in every bundle made of it."""
_KEPT_OF_CONVOLUTIONAL = ("adapter.places", "vision.head.weight", "memory_prior", "memory_encoder.pool")
"""The same of a model whose encoder is convolutional."""


class TorchRuntime:
    """`Runtime` over a MicroVLM. The cache stays a list of torch tensors on the model's device."""

    kernels = "eager, integers unpacked at load"

    def __init__(
        self, model: MicroVLM, device: str | torch.device | None = None, directory: Path | None = None
    ):
        """`directory`: where the processor's files are; the model's own origin when left out."""
        self.model = model.to(device).eval() if device is not None else model.eval()
        self.config = model.config
        self.directory = directory or model.directory or Path()
        self.fingerprint = fingerprint_of(model)
        self._device = model.memory_prior.device

    @property
    def threads(self) -> int:
        """Threads of one operator: torch's, of the whole process."""
        return torch.get_num_threads()

    def with_threads(self, threads: int) -> TorchRuntime:
        """See `microvlm.runtime.ChangesThreads`: this runtime, because torch's threads are the process's."""
        torch.set_num_threads(threads)
        return self

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return _array(self.model.encode_image(self._tensor(pixel_values)))

    def embed_tokens(self, input_ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return _array(self.model.embed(self._tensor(input_ids)))

    def decode(
        self,
        inputs_embeds: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        past: Cache,
        num_logits_to_keep: int = 1,
    ) -> tuple[np.ndarray, Cache]:
        with torch.inference_mode():
            arrays = map(self._tensor, (inputs_embeds, attention_mask, position_ids))
            # Sliced here, because the first call of a custom op imports torch's compiler, a second of start-up.
            hidden, present = self.model.decoder(*arrays, past)
            return _array(self.model.embedding.head(hidden[:, -num_logits_to_keep:])), present

    def empty_slot(self, batch: int) -> Cache:
        with torch.inference_mode():
            return self.model.empty_slot(batch)

    def memory_prior(self) -> MemoryArrays:
        return MemoryArrays(*map(_array, self.model.memory_reset()))

    def memory_encode(
        self, inputs_embeds: np.ndarray, attention_mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            latent, key = self.model.memory_encode(self._tensor(inputs_embeds), self._tensor(attention_mask))
            return _array(latent), _array(key)

    def memory_write(self, key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryArrays:
        with torch.inference_mode():
            return MemoryArrays(
                *map(_array, self.model.memory_write(*map(self._tensor, (key, latent, *state))))
            )

    def memory_forget(self, key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryArrays:
        with torch.inference_mode():
            return MemoryArrays(
                *map(_array, self.model.memory_forget(*map(self._tensor, (key, latent, *state))))
            )

    def memory_read(self, key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryReading:
        with torch.inference_mode():
            arrays = map(self._tensor, (key, latent, *state))
            read_latent, scope, residual, slot = self.model.memory_read(*arrays)
            return MemoryReading(_array(read_latent), _array(scope), _array(residual), slot)

    def quantized_layers(self) -> frozenset[str]:
        """See `microvlm.runtime.Instrumented`."""
        return frozenset(named_packed(self.model))

    def listening(self, listener: LayerListener) -> AbstractContextManager[None]:
        """See `microvlm.runtime.Instrumented`."""
        return listening(self.model, listener)

    def _tensor(self, array: np.ndarray) -> Tensor:
        # torch warns about arrays that it may not write to; none is written to here.
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(self._device)


@contextmanager
def listening(model: nn.Module, listener: LayerListener) -> Iterator[None]:
    """Inside the block, every eager call of every quantised layer of `model` goes past `listener`."""
    layers = named_packed(model)
    hooks = []
    try:
        for name, layer in layers.items():
            tap = _LayerTap(name, listener, layer.scale.detach().float().cpu().numpy())
            layer.tap, layer.sums_tap = tap.choose_activations, tap.observe_sums
            hooks.append(layer.register_forward_pre_hook(tap.keep_input))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers.values():
            layer.tap = layer.sums_tap = None


class _LayerTap:
    """Carries one layer's input and activations from the layer's hooks to the listener."""

    def __init__(self, name: str, listener: LayerListener, scale: np.ndarray):
        self._name, self._listener, self._scale = name, listener, scale
        self._x = np.zeros(0, np.float32)
        self._activations_q8 = np.zeros(0, np.int8)

    def keep_input(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._x = inputs[0].detach().float().cpu().numpy()

    def choose_activations(self, own: Tensor) -> Tensor:
        replacement = self._listener.replacement(self._name, self._x.shape)
        if replacement is not None:
            self._activations_q8 = replacement
            return torch.from_numpy(replacement.astype(np.float32)).to(own.device)
        # Of a token that is not finite torch keeps NaN, where the operator table has 0.
        self._activations_q8 = np.nan_to_num(own.cpu().numpy()).astype(np.int8)
        return own

    def observe_sums(self, sums: Tensor) -> None:
        integers = sums.cpu().numpy()
        # The order of the operator table: the bracket first.
        absmax = np.maximum(np.abs(self._x).max(-1, keepdims=True), ABSMAX_FLOOR)
        scaled = integers * ((absmax / Q8_MAX) * self._scale)
        call = LayerCall(self._x, self._activations_q8, integers, scaled_sums=scaled)
        self._listener.observe(self._name, call)


def fingerprint_of(model: MicroVLM) -> str:
    """16 hex digits: equal for a checkpoint and every bundle made of it, different between trainings."""
    digest = hashlib.sha256()
    tensors = model.state_dict()
    names = _KEPT_OF_CONVOLUTIONAL if model.config.vision.is_convolutional else _KEPT_AT_EVERY_WIDTH
    for name in names:
        digest.update(name.encode())
        digest.update(_array(tensors[name].float()).tobytes())
    return digest.hexdigest()[:16]


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
