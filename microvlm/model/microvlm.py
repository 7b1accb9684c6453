"""The reference model: vision, adapter, memory and decoder put together, and nothing else. Knows no images, no text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.model.adapter import Adapter
from microvlm.model.decoder import Cache, Decoder
from microvlm.model.embedding import TiedEmbedding
from microvlm.model.linear import linear_factory
from microvlm.model.memory_algebra import MemoryState, agreement, forget, key_variance, prior, read, write
from microvlm.model.memory_modules import MemoryEncoder, MemoryProjection, ScopeDetector
from microvlm.model.vision import VisionEncoder

if TYPE_CHECKING:
    from PIL.Image import Image


class MicroVLM(nn.Module):
    """Shapes: B batch, S new tokens, P past positions (the memory slot is position 0), H decoder width, k prefix."""

    directory: Path | None = None
    """Where the weights came from; the processor's files are there too."""

    def __init__(self, config: MicroVLMConfig):
        super().__init__()
        self.config = config
        widths = config.quantization
        ternary, eight = linear_factory(widths.decoder_bits), linear_factory(widths.vision_bits)
        self.vision = VisionEncoder(config.vision, eight)
        self.adapter = Adapter(config, eight)
        self.embedding = TiedEmbedding(config.text.vocab_size, config.text.hidden_size, widths.embedding_bits)
        self.decoder = Decoder(config.text, ternary)
        self.memory_encoder = MemoryEncoder(config, ternary)
        self.memory_projection = MemoryProjection(config, eight)
        self.memory_projection.initialise_from(self.decoder.layers)
        self.scope = ScopeDetector(config, eight)
        self.memory_prior = nn.Parameter(torch.zeros(config.memory.slots, config.memory.code_size))

    # The functions below are the graphs of an export, one each; `exporters.contract` names their tensors.

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, side, side] normalised -> prefix embeddings [B, k, H]."""
        return self.adapter(self.vision(pixel_values))

    def embed(self, input_ids: Tensor) -> Tensor:
        """int64 [B, S] -> [B, S, H]."""
        return self.embedding.embed(input_ids)

    def decode(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Cache,
        num_logits_to_keep: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        """attention_mask int64 [B, P + S], its column 0 the memory slot's -> (logits [B, n or S, V], cache)."""
        hidden, present = self.decoder(inputs_embeds, attention_mask, position_ids, past, num_logits_to_keep)
        return self.embedding.head(hidden), present

    def memory_encode(self, inputs_embeds: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, H], int64 [B, S] -> (memory_code [B, C], memory_key [B, K])."""
        return self.memory_encoder(inputs_embeds, attention_mask)

    def memory_read(
        self, memory_key: Tensor, memory_code: Tensor, memory_mean: Tensor, memory_cov: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Cache]:
        """Query key [B, K] and code [B, C], M [B, K, C], U [B, K, K] -> (read code, scope [B], residual [B], KV slot).

        The covariance does not enter the read, which is deterministic; it tells how well the key is known.
        """
        recalled = read(MemoryState(memory_mean, memory_cov), memory_key)
        agreed = agreement(memory_code, recalled, memory_key, self.memory_encoder.key(recalled))
        fill = memory_cov.diagonal(dim1=-2, dim2=-1).mean(-1)
        scope, residual = self.scope(
            memory_code, recalled, agreed, key_variance(memory_key, memory_cov), fill
        )
        return recalled, scope, residual, self.memory_projection(recalled)

    def memory_write(
        self, memory_key: Tensor, memory_code: Tensor, memory_mean: Tensor, memory_cov: Tensor
    ) -> tuple[Tensor, Tensor]:
        """w [B, K], z [B, C], M [B, K, C], U [B, K, K] -> (M, U) with the row written."""
        variance = self.config.memory.observation_variance
        mean, covariance = write(MemoryState(memory_mean, memory_cov), memory_key, memory_code, variance)
        return mean, covariance

    def memory_forget(
        self, memory_key: Tensor, memory_code: Tensor, memory_mean: Tensor, memory_cov: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The reverse of `memory_write` with the same key and code."""
        variance = self.config.memory.observation_variance
        mean, covariance = forget(MemoryState(memory_mean, memory_cov), memory_key, memory_code, variance)
        return mean, covariance

    def memory_prior_state(self, batch: int = 1) -> MemoryState:
        """The empty memory, the learned prior mean R0 and U0 = I, with R0's gradient."""
        return prior(self.memory_prior, batch)

    def memory_reset(self, batch: int = 1) -> MemoryState:
        """The empty memory for inference."""
        return prior(self.memory_prior.detach(), batch)

    def empty_slot(self, batch: int) -> Cache:
        """A slot of zeros, to be masked."""
        text = self.config.text
        zeros = self.memory_prior.new_zeros(batch, text.num_key_value_heads, 1, text.head_dim)
        return [(zeros, zeros)] * text.num_hidden_layers

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        slot: Cache | None = None,
        slot_mask: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Teacher forcing: [B, S, H], int64 [B, S] (right or left padded) -> logits [B, S, V].

        `slot_mask` int64 [B] says for each row whether it sees `slot`; without a slot it is masked for all.
        `wanted` bool [B, S] computes logits at those positions alone, [wanted, V]: the head is dear in training.
        """
        batch = inputs_embeds.shape[0]
        if slot is None:
            slot = self.empty_slot(batch)
            slot_mask = attention_mask.new_zeros(batch)
        elif slot_mask is None:
            slot_mask = attention_mask.new_ones(batch)
        mask = torch.cat([slot_mask[:, None], attention_mask], 1)
        hidden, _ = self.decoder(inputs_embeds, mask, positions_of(attention_mask), slot)
        return self.embedding.head(hidden if wanted is None else hidden[wanted])

    def place_images(self, input_ids: Tensor, image_token_id: int, prefixes: Tensor) -> Tensor:
        """Token embeddings with the rows of `image_token_id` replaced, in order, by `prefixes` [images, k, H].

        Raises ValueError when there are not k such tokens for each image.
        """
        embeds = self.embed(input_ids)
        places = input_ids == image_token_id
        count, (images, k, _) = int(places.sum()), prefixes.shape
        if count != images * k:
            raise ValueError(f"{count} image tokens do not hold {images} images of {k} embeddings")
        where = places.unsqueeze(-1).expand_as(embeds)
        return embeds.masked_scatter(where, prefixes.to(embeds.dtype))

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str = "cpu") -> MicroVLM:
        """A checkpoint: a directory, a hub id, or a bundled name such as `nano`. Loads strictly (UserError)."""
        from microvlm.model.checkpoint import load_checkpoint

        model = load_checkpoint(source)
        try:
            return model.to(device)
        except (RuntimeError, AssertionError):  # torch says an absent device in either way
            raise UserError(f"device '{device}' is not available here: choose cpu.") from None

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json, model.safetensors and the processor's files where known (aside, then renamed)."""
        from microvlm.model.checkpoint import save_checkpoint

        save_checkpoint(self, Path(directory))

    def generate(
        self,
        images: Sequence[Image | Sequence[Image]] | None = None,
        prompts: Sequence[str] | None = None,
        memory: MemoryState | None = None,
        **options: Any,
    ) -> list[str]:
        """Answers, one a prompt; see `microvlm.generation.GenerationOptions` for `options`.

        `images[i]` is one image or several for `prompts[i]`. A batch is padded on the left. `memory` is one state
        [1, K, C] for all rows or one a row; what the scope detector finds out of scope is masked.
        """
        from microvlm.model.torch_runtime import generate

        return generate(self, images, prompts, memory, **options)


def positions_of(attention_mask: Tensor) -> Tensor:
    """int64 [B, S] -> position ids [B, S]: text starts at 1, because position 0 is the memory slot's."""
    return attention_mask.cumsum(1).clamp(min=1)
