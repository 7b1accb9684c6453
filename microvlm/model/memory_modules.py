"""The learned parts of the memory: encoder, readout, W_M (a latent to one KV position) and scope detector."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.config import MicroVLMConfig
from microvlm.model.attention import rotary_tables
from microvlm.model.decoder import Cache, DecoderLayer, RMSNorm
from microvlm.model.initial_values import computed, is_empty
from microvlm.model.linear import LinearFactory
from microvlm.model.memory_algebra import address, reference_memory


class MemoryEncoder(nn.Module):
    """Encodes embeddings [B, S, H] with a mask [B, S] -> (latent [B, C] of unit length, key [B, K]).

    Bidirectional decoder layers and masked attention pooling. The same encoder gives keys (of the image or question
    alone) and values (of the image with the whole fact).
    """

    def __init__(self, config: MicroVLMConfig, ternary: LinearFactory):
        super().__init__()
        text, memory = config.text, config.memory
        self.text = text
        self.layers = nn.ModuleList(DecoderLayer(text, ternary) for _ in range(memory.encoder_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.pool = nn.Parameter(torch.zeros(text.hidden_size))
        self.output = ternary(text.hidden_size, memory.code_size, False)
        inverse = computed(
            memory.code_size,
            memory.slots,
            values=lambda: torch.linalg.pinv(reference_memory(memory.slots, memory.code_size)),
        )
        self.register_buffer("pseudo_inverse", inverse)

    pseudo_inverse: Tensor

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        cos, sin = rotary_tables(positions, self.text.head_dim, self.text.rope_theta)
        is_real = attention_mask.bool()
        # Padding attends to every real token, and to itself where there is none.
        eye = torch.eye(is_real.shape[1], dtype=torch.bool, device=is_real.device)
        mask = is_real[:, None, None, :] | eye
        x = inputs_embeds
        for layer in self.layers:
            x, _ = layer(x, cos, sin, mask, None)
        x = self.norm(x)
        scores = (x * self.pool).sum(-1).masked_fill(~is_real, torch.finfo(x.dtype).min)
        pooled = torch.einsum("bs,bsh->bh", scores.softmax(-1), x)
        latent = F.normalize(self.output(pooled), dim=-1, eps=1e-6)
        return latent, self.key(latent)

    def key(self, latent: Tensor) -> Tensor:
        """The key [B, K] of a latent [B, C]."""
        return address(latent, self.pseudo_inverse)


class Readout(nn.Module):
    """Corrects a reading [B, C] by two layers of hidden width `readout_size`. Starts as the identity.

    A reading of a full memory is the latent that was written plus parts of many others. A linear map cannot separate
    them, because they are latents of the same kind.
    """

    def __init__(self, config: MicroVLMConfig, linear: LinearFactory):
        super().__init__()
        width = config.memory.code_size
        # The components of a unit vector are small: the gain brings them to size 1.
        self.gain = width**0.5
        self.fc1 = linear(width, config.memory.readout_size, True)
        self.fc2 = linear(config.memory.readout_size, width, True)

    def forward(self, latent: Tensor) -> Tensor:
        return latent + self.fc2(F.gelu(self.fc1(self.gain * latent))) / self.gain


class MemoryProjection(nn.Module):
    """W_M: a latent [B, C] -> one key and value per layer, [B, kv_heads, 1, D] each."""

    def __init__(self, config: MicroVLMConfig, linear: LinearFactory):
        super().__init__()
        self.text = config.text
        # The components of a unit vector are small; at size 1 W_M learns as fast as any other layer.
        self.gain = config.memory.code_size**0.5
        self.readout = Readout(config, linear) if config.memory.readout_size else None
        self.linear = cast(nn.Linear, linear(config.memory.code_size, config.memory_kv_outputs, True))

    def initialise_from(self, key_biases: Iterable[Tensor | None]) -> None:
        """Start as the base model: keys at k_proj's biases (large in Qwen2), values at 0, the latent's part small.

        `key_biases`: that of each decoder layer, [kv_heads * D], or None.
        """
        if is_empty():
            return
        width = self.text.kv_width
        with torch.no_grad():
            if self.readout is not None:
                for parameter in self.readout.fc2.parameters():
                    parameter.zero_()
            self.linear.weight.normal_(std=1e-2 / self.gain)
            bias = self.linear.bias.view(self.text.num_hidden_layers, 2, width)
            bias.zero_()
            for row, key_bias in zip(bias, key_biases, strict=True):
                if key_bias is not None:
                    row[0].copy_(key_bias)

    def read_out(self, latent: Tensor) -> Tensor:
        """The corrected reading [B, C] that `linear` gets; unchanged without a readout."""
        return latent if self.readout is None else self.readout(latent)

    def forward(self, latent: Tensor) -> Cache:
        text = self.text
        flat = self.linear(self.gain * self.read_out(latent))
        slots = flat.view(-1, text.num_hidden_layers, 2, text.num_key_value_heads, 1, text.head_dim)
        return [(slots[:, layer, 0], slots[:, layer, 1]) for layer in range(text.num_hidden_layers)]


class ScopeDetector(nn.Module):
    """ScopeNet: estimates whether a reading answers its query.

    Its features are the product of query and reading, the residual |z_r - z_q|, the length of the reading, how well the
    memory knows the key, how full the memory is, and the agreement: the cosine of query and reading outside the
    subspace of the keys. Inside that subspace even the reading of an unknown key resembles its query, because it is the
    nearest mixture of what was written; outside of it only a written fact does.
    """

    def __init__(self, config: MicroVLMConfig, linear: LinearFactory):
        super().__init__()
        width = config.memory.code_size
        self.fc1 = linear(width + 5, 64, True)
        self.fc2 = linear(64, 1, True)

    def forward(
        self, query: Tensor, read: Tensor, agreement: Tensor, variance: Tensor, fill: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Estimate the scope -> (probability [B], residual [B]).

        `query` and `read` are latents [B, C]; `agreement`, `variance` (the key's posterior variance) and `fill` (the
        mean variance of all keys) have shape [B].
        """
        residual = (read - query).square().sum(-1).add(1e-12).sqrt()
        length = read.square().sum(-1).add(1e-12).sqrt()
        log_variance, log_fill = (part.clamp(min=1e-6).log() for part in (variance, fill))
        scalars = torch.stack([4 * agreement, 4 * residual, 4 * length, log_variance, log_fill], -1)
        # The components of a unit vector are small: all features are brought to the same size.
        features = torch.cat([query.shape[-1] * query * read, scalars], -1)
        logit = self.fc2(F.gelu(self.fc1(features)))
        return torch.sigmoid(logit).squeeze(-1), residual
