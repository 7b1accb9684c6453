"""Reads attention, alignment features and memory latents of one model for many pictures under one prompt.

Needs the model itself, so backend `torch`; graphs give no attention weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from microvlm.errors import UserError
from microvlm.generation import Prompt, embed_prompt, positions_of, repeat_memory
from microvlm.inputs.processor import Processor

if TYPE_CHECKING:
    from microvlm.backends.base import LoadedRuntime
    from microvlm.model.decoder import Cache
    from microvlm.model.torch_runtime import TorchRuntime

BATCH = 16


class TextTokens(NamedTuple):
    """The prompt's tokens that follow the picture, whose attention is read."""

    ids: tuple[int, ...]
    """Of the whole prompt."""
    labels: tuple[str, ...]
    """Text of the T tokens after the picture."""


class ModelAttention(NamedTuple):
    """What one model gives for N pictures: L layers, T text tokens, k prefix embeddings."""

    tokens: TextTokens
    prefix: tuple[np.ndarray, ...]
    """A layer's attention of the text tokens to the prefix, the slot masked, float32 [N, heads, T, k]."""
    slot: np.ndarray
    """Attention of the text tokens to the memory's slot where all may see it, mean, float64 [L, heads]."""
    pooled: np.ndarray
    """Alignment features, the mean of a picture's prefix embeddings, float32 [N, H]."""
    latents: np.ndarray
    """Memory latents of picture and prompt, float32 [N, C]."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, heads, prefix embeddings."""
        return len(self.prefix), self.prefix[0].shape[1], self.prefix[0].shape[3]


def read_model(
    runtime: LoadedRuntime, processor: Processor, pictures: Sequence[Path], prompt: str
) -> ModelAttention:
    """Run every picture with the prompt. Raises UserError for a bad picture, and for numbers that are not finite."""
    tokens = _text_tokens(processor, prompt)
    model_runtime = cast("TorchRuntime", runtime)
    parts, pooled, latents, keys, prompts = [], [], [], [], []
    for start in range(0, len(pictures), BATCH):
        batch = pictures[start : start + BATCH]
        inputs = processor([prompt] * len(batch), [[path] for path in batch])
        embedded = embed_prompt(runtime, *inputs, processor.image_id)
        is_prefix = inputs.input_ids == processor.image_id
        rows = embedded.inputs_embeds[is_prefix].reshape(len(batch), -1, embedded.inputs_embeds.shape[-1])
        pooled.append(rows.mean(1))
        latent, key = runtime.memory_encode(*embedded)
        latents.append(latent)
        keys.append(key)
        prompts.append(embedded)
        maps = _maps(model_runtime, embedded, runtime.empty_slot(len(batch)), 0)
        columns = np.flatnonzero(is_prefix[0]) + 1
        parts.append([layer[:, :, columns[-1] :][..., columns] for layer in maps])
    prefix = tuple(np.concatenate(layers) for layers in zip(*parts, strict=True))
    result = ModelAttention(
        tokens,
        prefix,
        _slot_attention(model_runtime, prompts, keys, latents, len(tokens.labels)),
        np.concatenate(pooled),
        np.concatenate(latents),
    )
    if not all(np.isfinite(part).all() for part in (*prefix, *result[2:])):
        raise UserError(
            f"{runtime.directory.name} computes numbers that are not finite: its weights are damaged; train or copy it "
            "again."
        )
    return result


def _text_tokens(processor: Processor, prompt: str) -> TextTokens:
    """Raises UserError for a template without text after the picture."""
    ids = processor.prompt_ids(prompt, 1)
    last = max(at for at, token in enumerate(ids) if token == processor.image_id)
    if last == len(ids) - 1:
        raise UserError(
            "the model's prompt ends with the picture: no token of text looks at it; give --prompt."
        )
    return TextTokens(tuple(ids), tuple(processor.decode([token]) or "·" for token in ids[last + 1 :]))


def _slot_attention(
    runtime: TorchRuntime,
    prompts: Sequence[Prompt],
    keys: Sequence[np.ndarray],
    latents: Sequence[np.ndarray],
    text_tokens: int,
) -> np.ndarray:
    """Mean attention [L, heads] to the slot that reads a memory of the first pictures, half as many as slots.

    Every row may see its slot, whatever the scope detector says: this is what a reading draws once it is shown.
    """
    state = runtime.memory_prior()
    written = list(zip(np.concatenate(keys), np.concatenate(latents), strict=True))
    for key, latent in written[: max(1, runtime.config.memory.slots // 2)]:
        state = runtime.memory_write(key[None], latent[None], state)
    total, rows = np.zeros((len(runtime.model.decoder.layers), 1)), 0
    for prompt, key, latent in zip(prompts, keys, latents, strict=True):
        reading = runtime.memory_read(key, latent, repeat_memory(state, len(key)))
        maps = _maps(runtime, prompt, cast("Cache", reading.slot), 1)
        means = [layer[:, :, -text_tokens:, 0].astype(np.float64).mean(2).sum(0) for layer in maps]
        total, rows = total + np.stack(means), rows + len(key)
    return total / rows


def _maps(runtime: TorchRuntime, prompt: Prompt, slot: Cache, visible: int) -> list[np.ndarray]:
    """A layer's attention weights float32 [B, heads, S, 1 + S] each; column 0 is the slot."""
    import torch

    column = np.full((len(prompt.attention_mask), 1), visible, np.int64)
    mask = np.concatenate([column, prompt.attention_mask], 1)
    arrays = (prompt.inputs_embeds, mask, positions_of(prompt.attention_mask))
    with torch.inference_mode():
        device = runtime.model.memory_prior.device
        embeds, seen, positions = (torch.from_numpy(array).to(device) for array in arrays)
        layers = runtime.model.decoder.attention_maps(embeds, seen, positions, slot)
        return [layer.float().cpu().numpy() for layer in layers]
