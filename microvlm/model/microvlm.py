"""The reference model in PyTorch: vision encoder, adapter, memory and decoder as one module."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.model.adapter import Adapter, GridAdapter
from microvlm.model.convolution.efficientnet import EfficientNetLite
from microvlm.model.decoder import Cache, Decoder
from microvlm.model.embedding import TiedEmbedding
from microvlm.model.linear import linear_factory
from microvlm.model.memory_algebra import MemoryState, agreement, forget, key_variance, prior, read, write
from microvlm.model.memory_modules import MemoryEncoder, MemoryProjection, ScopeDetector
from microvlm.model.vision import VisionEncoder
from microvlm.runtime import MemoryArrays

if TYPE_CHECKING:
    from microvlm.inputs.batch import Images, Prompts
    from microvlm.inputs.images import ImageSource
    from microvlm.inputs.processor import Processor
    from microvlm.loaded_model import LoadedModel, MemorySource


class MicroVLM(nn.Module):
    """The whole model. Shapes: B batch, S new tokens, P past positions (0 is the memory slot), H decoder width, k
    prefix tokens per image, K slots of the memory, C width of a latent."""

    directory: Path | None = None
    """The directory that the weights were loaded from; it also holds the processor's files."""

    def __init__(self, config: MicroVLMConfig):
        super().__init__()
        self.config = config
        widths = config.quantization
        ternary, eight = linear_factory(widths.decoder_bits), linear_factory(widths.vision_bits)
        self.vision: VisionEncoder | EfficientNetLite
        self.adapter: Adapter | GridAdapter
        if config.vision.is_convolutional:
            self.vision, self.adapter = EfficientNetLite(config.vision, eight), GridAdapter(config, eight)
        else:
            self.vision, self.adapter = VisionEncoder(config.vision, eight), Adapter(config, eight)
        self.embedding = TiedEmbedding(config.text.vocab_size, config.text.hidden_size, widths.embedding_bits)
        self.decoder = Decoder(config.text, ternary)
        self.memory_encoder = MemoryEncoder(config, ternary)
        self.memory_projection = MemoryProjection(config, eight)
        self.memory_projection.initialise_from(self.decoder.key_biases())
        self.scope = ScopeDetector(config, eight)
        self.memory_prior = nn.Parameter(torch.zeros(config.memory.slots, config.memory.code_size))

    # Each method below becomes one graph of an export; `exporters.contract` names the tensors.

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Encode normalised pixels [B, 3, side, side] -> prefix embeddings [B, k, H]."""
        return self.adapter(self.vision(pixel_values))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed token ids int64 [B, S] -> [B, S, H]."""
        return self.embedding.embed(input_ids)

    def decode(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Cache,
        num_logits_to_keep: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        """Decode [B, S, H] after a cache of P positions -> (logits [B, n or S, V], cache).

        attention_mask is int64 [B, P + S], with the memory slot in column 0.
        """
        hidden, present = self.decoder(inputs_embeds, attention_mask, position_ids, past, num_logits_to_keep)
        return self.embedding.head(hidden), present

    def memory_encode(self, inputs_embeds: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode [B, S, H] with mask int64 [B, S] -> (latent [B, C], key [B, K])."""
        return self.memory_encoder(inputs_embeds, attention_mask)

    def memory_read(
        self, memory_key: Tensor, memory_code: Tensor, memory_mean: Tensor, memory_cov: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Cache]:
        """Read with a query's key [B, K] and latent [B, C] -> (latent [B, C], scope [B], residual [B], KV slot).

        The state is M [B, K, C] and U [B, K, K]. The latent does not depend on U, which says how well the key is known.
        """
        latent = read(MemoryState(memory_mean, memory_cov), memory_key)
        cosine = agreement(memory_code, latent, memory_key, self.memory_encoder.key(latent))
        fill = memory_cov.diagonal(dim1=-2, dim2=-1).mean(-1)
        scope, residual = self.scope(memory_code, latent, cosine, key_variance(memory_key, memory_cov), fill)
        return latent, scope, residual, self.memory_projection(latent)

    def memory_write(
        self, memory_key: Tensor, memory_code: Tensor, memory_mean: Tensor, memory_cov: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write the row w [B, K], z [B, C] into M [B, K, C], U [B, K, K] -> the new (M, U)."""
        variance = self.config.memory.observation_variance
        mean, covariance = write(MemoryState(memory_mean, memory_cov), memory_key, memory_code, variance)
        return mean, covariance

    def memory_forget(
        self, memory_key: Tensor, memory_code: Tensor, memory_mean: Tensor, memory_cov: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Undo `memory_write` of the same key and latent -> the new (M, U)."""
        variance = self.config.memory.observation_variance
        mean, covariance = forget(MemoryState(memory_mean, memory_cov), memory_key, memory_code, variance)
        return mean, covariance

    def memory_prior_state(self, batch: int = 1) -> MemoryState:
        """The empty memory for training: the learned prior mean R0, with its gradient, and U0 = I."""
        return prior(self.memory_prior, batch)

    def memory_reset(self, batch: int = 1) -> MemoryState:
        """The empty memory for inference, without gradients."""
        return prior(self.memory_prior.detach(), batch)

    def empty_slot(self, batch: int) -> Cache:
        """A memory slot of zeros, which the attention mask must hide."""
        text = self.config.text
        zeros = self.memory_prior.new_zeros(batch, text.num_key_value_heads, 1, text.head_dim)
        return [(zeros, zeros)] * text.num_hidden_layers

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        slot: Cache | None = None,
        slot_mask: Tensor | None = None,
        logits_mask: Tensor | None = None,
    ) -> Tensor:
        """Teacher forcing: embeddings [B, S, H], mask int64 [B, S] (padded on either side) -> logits [B, S, V].

        `slot_mask` int64 [B] says which rows see `slot`; without a slot no row does. With `logits_mask` bool [B, S]
        only the N positions that it marks get logits, [N, V]: the output head is expensive in training.
        """
        hidden = self.hidden_states(inputs_embeds, attention_mask, slot, slot_mask)
        return self.embedding.head(hidden if logits_mask is None else hidden[logits_mask])

    def hidden_states(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        slot: Cache | None = None,
        slot_mask: Tensor | None = None,
    ) -> Tensor:
        """What `forward` gives the output head, [B, S, H]."""
        batch = inputs_embeds.shape[0]
        if slot is None:
            slot = self.empty_slot(batch)
            slot_mask = attention_mask.new_zeros(batch)
        elif slot_mask is None:
            slot_mask = attention_mask.new_ones(batch)
        mask = torch.cat([slot_mask[:, None], attention_mask], 1)
        hidden, _ = self.decoder(inputs_embeds, mask, positions_of(attention_mask), slot)
        return hidden

    def place_images(self, input_ids: Tensor, image_token_id: int, prefixes: Tensor) -> Tensor:
        """Embed tokens [B, S] and replace the image tokens, in order, by `prefixes` [images, k, H] -> [B, S, H].

        Raises ValueError unless there are k image tokens per image.
        """
        embeds = self.embed(input_ids)
        is_image = input_ids == image_token_id
        count, (images, k, _) = int(is_image.sum()), prefixes.shape
        if count != images * k:
            raise ValueError(f"{count} image tokens do not hold {images} images of {k} embeddings")
        return embeds.masked_scatter(is_image.unsqueeze(-1).expand_as(embeds), prefixes.to(embeds.dtype))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], device: str = "cpu") -> MicroVLM:
        """Load a checkpoint: a directory, a hub id or a bundled name such as `photo`. Raises UserError."""
        from microvlm.model.checkpoint import load_checkpoint

        model = load_checkpoint(source)
        try:
            return model.to(device)
        except (RuntimeError, AssertionError):  # torch raises either for a missing device
            raise UserError(f"device '{device}' is not available here: choose cpu.") from None

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json, model.safetensors and the processor's files, if any, all at once (`save_checkpoint`)."""
        from microvlm.model.checkpoint import save_checkpoint

        save_checkpoint(self, Path(directory))

    @overload
    def generate(
        self, images: ImageSource | None = None, prompts: str | None = None, **options: Any
    ) -> str: ...

    @overload
    def generate(
        self, images: list[Any] | tuple[Any, ...], prompts: Prompts | None = None, **options: Any
    ) -> list[str]: ...

    @overload
    def generate(
        self, images: Images | None = None, *, prompts: list[str] | tuple[str, ...], **options: Any
    ) -> list[str]: ...

    def generate(
        self,
        images: Images | None = None,
        prompts: Prompts | None = None,
        *,
        memory: MemoryState | MemorySource | None = None,
        processor: Processor | None = None,
        **options: Any,
    ) -> str | list[str]:
        """Answer prompts about images. See `LoadedModel.generate`, which also lists the `options`.

        `memory` may be a `MemoryState` too, one state [1, K, C] for all rows or one per row. `processor` is needed for
        a model that was not loaded from a directory. Raises UserError.
        """
        if isinstance(memory, MemoryState):
            memory = MemoryArrays(*(part.detach().cpu().numpy() for part in memory))
        loaded_model: Any = self.to_loaded_model(processor)
        return loaded_model.generate(images, prompts, memory=memory, **options)

    def to_loaded_model(self, processor: Processor | None = None) -> LoadedModel:
        """This model as `microvlm.load` would return it, on backend `torch`.

        `processor` is read from the model's directory when left out. Raises UserError for a model without one.
        """
        from microvlm.inputs.processor import Processor
        from microvlm.loaded_model import LoadedModel
        from microvlm.model.torch_runtime import TorchRuntime

        if processor is None:
            if self.directory is None:
                raise UserError("this model was not loaded from a directory; pass processor=.")
            processor = Processor.from_pretrained(self.directory)
        return LoadedModel(TorchRuntime(self), processor)


def positions_of(attention_mask: Tensor) -> Tensor:
    """Attention mask int64 [B, S] -> position ids [B, S]. Text starts at 1; position 0 is the memory slot."""
    return attention_mask.cumsum(1).clamp(min=1)
