"""`Runtime`: what every backend does with one model, in numpy arrays; and what a backend may offer beyond that.

The optional Protocols after `Runtime` are looked for in a loaded runtime, whoever wrote it. Imports no torch.

Shapes: B batch, S new tokens, P past positions (position 0 is the memory slot), H width, k prefix tokens per image,
K memory slots, C memory width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from microvlm.config import MicroVLMConfig

Past = Any
"""A KV cache in the form that the backend keeps it; callers hand it back untouched. To be compared with another
backend's, it is a nest of lists, tuples or dicts, layer by layer, of arrays or of `ArrayValue`s."""


class MemoryArrays(NamedTuple):
    """A memory state, float32."""

    mean: np.ndarray
    """[B, K, C]"""
    covariance: np.ndarray
    """[B, K, K]"""


Memories = MemoryArrays | list[MemoryArrays]
"""One state, or the states of an episode that outgrew one."""


class MemoryReading(NamedTuple):
    """The result of reading a memory, float32."""

    latent: np.ndarray
    """z_r [B, C]."""
    scope: np.ndarray
    """Probability that the reading answers the query, [B]."""
    residual: np.ndarray
    """|z_r - z_q|, [B]."""
    slot: Past
    """One KV position per layer: the cache a prefill starts from."""


class Runtime(Protocol):
    """One loaded model. All arrays float32 unless said otherwise; ids, masks and positions int64."""

    config: MicroVLMConfig

    def encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """[B, 3, side, side] normalised -> [B, k, H]."""
        ...

    def embed_tokens(self, input_ids: np.ndarray) -> np.ndarray:
        """[B, S] -> [B, S, H]."""
        ...

    def decode(
        self,
        inputs_embeds: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        past: Past,
        num_logits_to_keep: int = 1,
    ) -> tuple[np.ndarray, Past]:
        """[B, S, H], [B, P + S], [B, S], cache -> (logits [B, n, V], cache). Prefill and decode alike."""
        ...

    def empty_slot(self, batch: int) -> Past:
        """A slot of zeros, for a memory that is off; mask it in column 0 of `attention_mask`."""
        ...

    def memory_prior(self) -> MemoryArrays:
        """The empty memory, batch 1."""
        ...

    def memory_encode(
        self, inputs_embeds: np.ndarray, attention_mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """[B, S, H], [B, S] -> (latent [B, C], key [B, K])."""
        ...

    def memory_write(self, key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryArrays:
        """[B, K], [B, C], state -> the state with the row added."""
        ...

    def memory_forget(self, key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryArrays:
        """[B, K], [B, C], state -> the state without a row that was written with these values."""
        ...

    def memory_read(self, key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryReading:
        """[B, K], [B, C] of the query, state -> the reading."""
        ...


@runtime_checkable
class ArrayValue(Protocol):
    """A value that a backend keeps in its own form."""

    def numpy(self) -> np.ndarray:
        """A copy, or a view that stays valid."""
        ...


@runtime_checkable
class ReportsKernels(Protocol):
    """A runtime that says which code runs its quantised layers. Reports show the sentence."""

    kernels: str


@runtime_checkable
class ReportsThreads(Protocol):
    """A runtime that says how many threads run one operator."""

    threads: int


@runtime_checkable
class ChangesThreads(Protocol):
    """A runtime whose model can be run with another number of threads, without another check of its files."""

    def with_threads(self, threads: int) -> Any:
        """The same model with so many threads of one operator: a `LoadedRuntime`, this one or another.

        Raises UserError where they cannot be started.
        """
        ...


@runtime_checkable
class RunsElsewhere(Protocol):
    """A runtime whose graphs run on another machine, or on an emulated one."""

    @property
    def target(self) -> str:
        """The machine's address, as its backend's option spells it."""
        ...

    @property
    def device(self) -> dict[str, Any]:
        """The machine's processor, memory and versions, for reports; JSON values."""
        ...

    def condition(self) -> dict[str, Any]:
        """The present memory of the process that runs the graphs, as `provenance.memory_of_this_process` names it, and
        the machine's temperature or load where known; JSON values."""
        ...


@runtime_checkable
class OpensAhead(Protocol):
    """A runtime that opens parts of a model on their first use, and can do so at once: loading is timed with it."""

    def open_ahead(self) -> None:
        """Open everything that the methods of `Runtime` would open. Raises UserError."""
        ...


class HeldMemory(Protocol):
    """A memory state that is changed in place: keys [B, K] and latents [B, C], float32."""

    @property
    def state(self) -> MemoryArrays:
        """The present state, not a copy: a later step may change the arrays."""
        ...

    def snapshot(self) -> MemoryArrays:
        """A copy of the state, which no step changes."""
        ...

    def write(self, key: np.ndarray, latent: np.ndarray) -> None: ...

    def forget(self, key: np.ndarray, latent: np.ndarray) -> None: ...

    def overwrite(
        self, old_key: np.ndarray, old_latent: np.ndarray, key: np.ndarray, latent: np.ndarray
    ) -> None:
        """Forget the old row, write the new one; the state is as before when either fails."""
        ...


@runtime_checkable
class HoldsMemory(Protocol):
    """A runtime with buffers of its own for a memory state, where writing and forgetting copy nothing."""

    def hold_memory(self, state: MemoryArrays) -> HeldMemory:
        """Starts with a copy of `state`."""
        ...


class LayerCall(NamedTuple):
    """One call of one quantised layer with N outputs: leading dimensions are rows (tokens)."""

    x: np.ndarray
    """float32 [..., width]: the layer's input before it is quantised."""
    activations_q8: np.ndarray
    """int8 [..., width]: what the sums were made of, the layer's own or the replacement."""
    sums: np.ndarray
    """Integers as float32 [..., N], before scales and bias."""
    operator_output: np.ndarray | None = None
    """float32 [..., N]: the backend's operator on x, where it can be had apart from `sums`."""
    scaled_sums: np.ndarray | None = None
    """float32 [..., N]: `sums` times the scales, to compare with `operator_output` and with another backend's."""


class LayerListener(Protocol):
    """Hears every call of every quantised layer. It replaces the activations of all calls or of none."""

    def replacement(self, layer: str, shape: tuple[int, ...] | None = None) -> np.ndarray | None:
        """Called before a layer: returns int8 [..., width] to replace its activations, or None to keep them.

        `shape` is the input's, where it is known before the call.
        """
        ...

    def observe(self, layer: str, call: LayerCall) -> None:
        """Called after a layer, with its activations and results."""
        ...

    def observe_fused(self, node: str, outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
        """Called after a node that joins several layers: its own outputs, and those that its layers, opened, gave.

        The two are equal bit for bit, unless activations were replaced.
        """
        ...


@runtime_checkable
class Instrumented(Protocol):
    """A runtime whose quantised layers can be recorded and replayed, as `microvlm-bench equivalence` does."""

    def quantized_layers(self) -> frozenset[str]:
        """Their names: the name of the packed weight without `.packed`, e.g. `decoder.layers.0.mlp.up_proj`.

        Raises UserError where the layers cannot be opened here: one clause that says what is missing.
        """
        ...

    def listening(self, listener: LayerListener) -> AbstractContextManager[None]:
        """A context: inside, the quantised layers of every call of this runtime go past `listener`."""
        ...
