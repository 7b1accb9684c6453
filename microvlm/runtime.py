"""What every backend can do with one model: the graphs of a bundle as methods on numpy arrays. No torch here.

Shapes: B batch, S new tokens, P past positions (position 0 is the memory slot), H width, k prefix tokens per image.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from microvlm.config import MicroVLMConfig

Past = Any
"""A KV cache in whatever form the backend keeps it. The loop hands it back untouched."""


class MemoryArrays(NamedTuple):
    """A memory state, float32."""

    mean: np.ndarray
    """[B, K, C]"""
    covariance: np.ndarray
    """[B, K, K]"""


Memories = MemoryArrays | list[MemoryArrays]
"""One state, or the states of an episode that outgrew one."""


class MemoryReading(NamedTuple):
    """What reading gave."""

    latent: np.ndarray
    """z_r [B, C]"""
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

    def memory_write(self, key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryArrays: ...

    def memory_forget(self, key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryArrays: ...

    def memory_read(self, key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryReading: ...
