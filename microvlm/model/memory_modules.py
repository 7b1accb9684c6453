"""The learned parts around the memory: encoder of codes, W_M (a code to one KV position), scope detector."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.config import MicroVLMConfig
from microvlm.model.attention import rotary_tables
from microvlm.model.decoder import Cache, DecoderLayer, RMSNorm
from microvlm.model.linear import LinearFactory
from microvlm.model.memory_algebra import address, reference_memory


class MemoryEncoder(nn.Module):
    """inputs_embeds [B, S, H], attention_mask [B, S] -> (code [B, C], unit length; key [B, K]).

    Bidirectional decoder blocks and masked attention pooling. The same encoder makes keys (image or question alone)
    and values (image with the full fact).
    """

    def __init__(self, config: MicroVLMConfig, ternary: LinearFactory):
        super().__init__()
        text, memory = config.text, config.memory
        self.text = text
        self.layers = nn.ModuleList(DecoderLayer(text, ternary) for _ in range(memory.encoder_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.pool = nn.Parameter(torch.zeros(text.hidden_size))
        self.output = ternary(text.hidden_size, memory.code_size, False)
        reference = reference_memory(memory.slots, memory.code_size)
        self.register_buffer("pseudo_inverse", torch.linalg.pinv(reference))

    pseudo_inverse: Tensor

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        cos, sin = rotary_tables(positions, self.text.head_dim, self.text.rope_theta)
        seen = attention_mask.bool()
        # A padded row attends to everything that is real; a row of nothing but padding sees itself.
        eye = torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)
        mask = seen[:, None, None, :] | eye
        x = inputs_embeds
        for layer in self.layers:
            x, _ = layer(x, cos, sin, mask, None)
        x = self.norm(x)
        scores = (x * self.pool).sum(-1).masked_fill(~seen, torch.finfo(x.dtype).min)
        pooled = torch.einsum("bs,bsh->bh", scores.softmax(-1), x)
        code = F.normalize(self.output(pooled), dim=-1, eps=1e-6)
        return code, self.key(code)

    def key(self, code: Tensor) -> Tensor:
        """[B, C] -> [B, K]."""
        return address(code, self.pseudo_inverse)


class Readout(nn.Module):
    """A read code [B, C] -> the same, with what two layers of width `readout_size` take out of it.

    A read through a full memory is the code that was written and parts of many others. What those have in common with
    it no linear map can tell apart: they are codes of the same kind. Starts as the identity.
    """

    def __init__(self, config: MicroVLMConfig, linear: LinearFactory):
        super().__init__()
        width = config.memory.code_size
        # Numbers of a unit vector are small: all features are brought to the same size.
        self.gain = width**0.5
        self.fc1 = linear(width, config.memory.readout_size, True)
        self.fc2 = linear(config.memory.readout_size, width, True)

    def forward(self, code: Tensor) -> Tensor:
        return code + self.fc2(F.gelu(self.fc1(self.gain * code))) / self.gain


class MemoryProjection(nn.Module):
    """W_M: a code [B, C] -> one key and value per layer, [B, kv_heads, 1, D] each, sized by KV heads."""

    def __init__(self, config: MicroVLMConfig, linear: LinearFactory):
        super().__init__()
        self.text = config.text
        # The numbers of a unit vector are small; at size 1 W_M learns as fast as any other layer.
        self.gain = config.memory.code_size**0.5
        self.readout = Readout(config, linear) if config.memory.readout_size else None
        self.linear = cast(nn.Linear, linear(config.memory.code_size, config.memory_kv_outputs, True))

    def initialise_from(self, layers: nn.ModuleList) -> None:
        """Step 0 is the base model: K starts at k_proj's bias (Qwen2's are large), V at 0, the code's part small."""
        width = self.text.kv_width
        with torch.no_grad():
            if self.readout is not None:
                for parameter in self.readout.fc2.parameters():
                    parameter.zero_()
            self.linear.weight.normal_(std=1e-2 / self.gain)
            bias = self.linear.bias.view(self.text.num_hidden_layers, 2, width)
            bias.zero_()
            for row, layer in zip(bias, cast(Iterable[DecoderLayer], layers), strict=True):
                if layer.self_attn.k_proj.bias is not None:
                    row[0].copy_(layer.self_attn.k_proj.bias)

    def read_out(self, code: Tensor) -> Tensor:
        """A read code [B, C] -> what `linear` sees of it, [B, C]; the same where there is no readout."""
        return code if self.readout is None else self.readout(code)

    def forward(self, code: Tensor) -> Cache:
        text = self.text
        flat = self.linear(self.gain * self.read_out(code))
        slots = flat.view(-1, text.num_hidden_layers, 2, text.num_key_value_heads, 1, text.head_dim)
        return [(slots[:, layer, 0], slots[:, layer, 1]) for layer in range(text.num_hidden_layers)]


class ScopeDetector(nn.Module):
    """ScopeNet: does the read answer the query?

    It sees where query and read code agree, and what no layer makes of them: the residual |z_r - z_q|, a score of its
    own that costs nothing; the length of the read; how well the memory knows the key, and how full it is; and the
    agreement, the cosine of query and read code outside of the space of the keys. A read of keys that were never
    written still resembles its query inside of that space, because it is the nearest mixture of what was written;
    outside of it only a fact that was written does.
    """

    def __init__(self, config: MicroVLMConfig, linear: LinearFactory):
        super().__init__()
        width = config.memory.code_size
        self.fc1 = linear(width + 5, 64, True)
        self.fc2 = linear(64, 1, True)

    def forward(
        self, query: Tensor, read: Tensor, agreement: Tensor, variance: Tensor, fill: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Codes [B, C]; cosine, posterior variance of the key and mean variance of all keys [B] -> (probability [B],
        residual [B])."""
        residual = (read - query).square().sum(-1).add(1e-12).sqrt()
        length = read.square().sum(-1).add(1e-12).sqrt()
        known, empty = (part.clamp(min=1e-6).log() for part in (variance, fill))
        scalars = torch.stack([4 * agreement, 4 * residual, 4 * length, known, empty], -1)
        # Numbers of a unit vector are small: all features are brought to the same size.
        features = torch.cat([query.shape[-1] * query * read, scalars], -1)
        logit = self.fc2(F.gelu(self.fc1(features)))
        return torch.sigmoid(logit).squeeze(-1), residual
