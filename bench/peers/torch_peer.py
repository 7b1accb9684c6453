"""The decoder in PyTorch, eager or compiled, in float32 or with bfloat16 products: no weight is quantised.

It is this project's own module, and has the names and the arithmetic of transformers' Llama and Qwen2.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.formats.headers.safetensors_header import read_header
from microvlm.presets import preset
from microvlm.sources.model_source import WEIGHTS

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class TorchPeer:
    """`file`: the folder of a float checkpoint, None for random weights in the shape of `preset_name`.

    `compiled`: torch.compile of a layer, once for all layers of one shape and for any length. With bfloat16 the
    products' weights are stored so; norms stay float32 and autocast converts what lies between.
    """

    def __init__(
        self,
        threads: int,
        prompt_tokens: int,
        file: str | None,
        preset_name: str | None,
        dtype: str,
        compiled: bool,
    ):
        import torch

        from microvlm.model.decoder import Decoder
        from microvlm.model.embedding import TiedEmbedding
        from microvlm.model.initial_values import empty_modules
        from microvlm.model.linear import linear_factory

        torch.set_num_threads(threads)
        self._dtype = getattr(torch, dtype)
        config = preset(preset_name or "") if file is None else MicroVLMConfig.load(Path(file))
        with empty_modules():
            self._decoder = Decoder(config.text, linear_factory(32)).eval()
            self._embedding = TiedEmbedding(config.text.vocab_size, config.text.hidden_size, 32)
        for name, module in (("decoder", self._decoder), ("embedding", self._embedding)):
            _fill(module, name, file, self._dtype)
        weights = [*self._decoder.parameters(), *self._embedding.parameters()]
        self.weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
        self.kernels = f"{'compiled' if compiled else 'eager'}, {dtype}"
        if compiled:
            for layer in self._decoder.layers:
                layer.compile(dynamic=True)
        torch.manual_seed(0)
        self._tokens = torch.randint(config.text.vocab_size, (1, prompt_tokens))
        zeros = torch.zeros(1, config.text.num_key_value_heads, 1, config.text.head_dim)
        self._slot = [(zeros, zeros)] * config.text.num_hidden_layers

    def run(self, new_tokens: int) -> tuple[float, float | None]:
        import torch

        count = self._tokens.shape[1]
        mask = torch.ones((1, count + 1), dtype=torch.int64)
        mask[0, 0] = 0  # nothing is remembered
        with torch.inference_mode(), torch.autocast("cpu", self._dtype, self._dtype != torch.float32):
            began = time.perf_counter()
            token, past = self._step(self._tokens, mask, torch.arange(1, count + 1)[None], self._slot)
            prefill_ms = (time.perf_counter() - began) * 1e3
            began = time.perf_counter()
            for step in range(1, new_tokens + 1):
                mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
                token, past = self._step(token, mask, torch.tensor([[count + step]]), past)
            decode_ms = (time.perf_counter() - began) * 1e3
        return prefill_ms, decode_ms / new_tokens if new_tokens else None

    def logits(self, tokens: Tensor) -> Tensor:
        """int64 [1, S] -> the last position's logits [1, 1, V], without a memory."""
        import torch

        count = tokens.shape[1]
        mask = torch.ones((1, count + 1), dtype=torch.int64)
        mask[0, 0] = 0
        with torch.inference_mode(), torch.autocast("cpu", self._dtype, self._dtype != torch.float32):
            return self._forward(tokens, mask, torch.arange(1, count + 1)[None], self._slot)[0]

    def _step(self, tokens: Tensor, mask: Tensor, positions: Tensor, past: list) -> tuple[Tensor, list]:
        """-> the likeliest next token int64 [1, 1], and the cache."""
        logits, past = self._forward(tokens, mask, positions, past)
        return logits[:, -1].argmax(-1)[:, None], past

    def _forward(self, tokens: Tensor, mask: Tensor, positions: Tensor, past: list) -> tuple[Tensor, list]:
        # The stream between layers is float32, as sums of many terms should be.
        embeds = self._embedding.embed(tokens).float()
        hidden, past = self._decoder(embeds, mask, positions, past)
        return self._embedding.head(hidden[:, -1:]), past


def _fill(module: nn.Module, part: str, file: str | None, dtype: torch.dtype) -> None:
    """Give a module that was built empty its weights, a tensor at a time. Raises UserError."""
    import torch

    if file is None:
        torch.manual_seed(0)
    read = _random if file is None else _reader(Path(file, WEIGHTS), part)
    values = {}
    for name, weight in module.named_parameters():
        values[name] = read(name, weight.shape).to(torch.float32 if "norm" in name else dtype)
    module.load_state_dict(values, assign=True)


def _random(name: str, shape: torch.Size) -> Tensor:
    import torch

    # Drawn in half the bytes: what is made on the way to a weight would count as the program's peak.
    return torch.ones(shape) if "norm" in name else torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def _reader(path: Path, part: str) -> Callable[[str, torch.Size], Tensor]:
    """Reads float32 tensors of one part of a checkpoint, without mapping the file, whose pages would count here."""
    import torch

    from microvlm.model.pretrained.stored_weights import read_range

    try:
        stored = read_header(path, "copy the checkpoint again").tensors
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the folder of a checkpoint.") from None

    def read(name: str, shape: torch.Size) -> Tensor:
        tensor = stored.get(f"{part}.{name}")
        if tensor is None or (tensor.dtype, tensor.shape) != ("F32", tuple(shape)):
            raise UserError(f"{path} has no float32 {part}.{name}: give a checkpoint that was not packed.")
        content = read_range(path, tensor.start, tensor.nbytes)
        return torch.frombuffer(content, dtype=torch.float32).reshape(shape)

    return read
