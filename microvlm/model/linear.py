"""Every kind of linear layer behind one constructor signature: a model is defined once, quantised by injection.

Training kinds hold float weights: `Linear`, `TernaryLinear` (BitNet b1.58), `Int8Linear`. Inference kinds hold the
bytes that an exported graph holds: `PackedLinear`, and `DenseTritLinear` (the same trits at 16 or 32 bits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.formats.op_table import MATMUL_BY_KIND, TERNARY_LAYOUTS
from microvlm.model import torch_ops

Tap = Callable[[Tensor], Tensor]
"""Sees the int8 codes of one layer (as float32 integers) and returns the codes to use: record or replay."""


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [N, K] -> (trits as floats [N, K], g [1]): g = mean |W| (>= 1e-5), trits = clip(round(W / g), -1, 1)."""
    scale = weight.detach().abs().mean().clamp(min=1e-5).reshape(1)
    return torch.clamp(torch.round(weight / scale), -1.0, 1.0), scale


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [N, K] -> (integers as floats in -127..127, scale [N]): absolute maximum of a row at 127."""
    scale = weight.detach().abs().amax(1).clamp(min=1e-8) / 127.0
    return torch.clamp(torch.round(weight / scale[:, None]), -127.0, 127.0), scale


class _QuantizedProduct(torch.autograd.Function):
    """The integer product of `op_table` forward; straight through both quantisers backward (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kind: str, made: tuple[Tensor, Tensor]) -> Tensor:
        """`made`: the integers and the scale of `weight`."""
        x32 = x.float()
        codes, step = torch_ops.quantize_activations(x32)
        integers, scale = made
        ctx.save_for_backward(codes, step, integers, scale)
        ctx.dtype = x.dtype
        # bfloat16 holds every code (8 bits) and every int8 weight exactly; only the gradient itself is rounded.
        ctx.low = torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else torch.float32
        # Autocast would round the sums; exact ones make training the very function that is shipped.
        with torch_ops.full_precision(x.device.type):
            sums = torch_ops.integer_sums(codes, integers, 1 if kind == "ternary" else 127)
        return torch_ops.scale_sums(sums, step, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        codes, step, integers, scale = ctx.saved_tensors
        grad = grads[0].float()
        low = ctx.low
        scaled = (grad * scale).to(low)
        grad_x = (scaled @ integers.to(low)).to(ctx.dtype)
        weighted = (grad * step).to(low).flatten(0, -2)
        grad_weight = (weighted.T @ codes.to(low).flatten(0, -2)).float()
        return grad_x, grad_weight, None, None


Held = dict[tuple[int, str], tuple[Tensor, tuple[Tensor, Tensor]]]
"""By the weight's id and the kind: the weight, so that its id stays its own, and what it was rounded to."""
_held: ContextVar[Held | None] = ContextVar("_held", default=None)


@contextmanager
def weights_rounded_once() -> Iterator[None]:
    """Within it every latent weight is rounded once, however many products it is in: none may change there."""
    token = _held.set({})
    try:
        yield
    finally:
        _held.reset(token)


def rounded(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """float [N, K] -> (integers as floats [N, K], scale) of a `kind` of layer, without gradient."""
    held = _held.get()
    if held is not None and (id(weight), kind) in held:
        return held[id(weight), kind][1]
    with torch.no_grad():
        made = ternarize(weight) if kind == "ternary" else int8_rows(weight)
    if held is not None:
        held[id(weight), kind] = weight, made
    return made


def quantized_product(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    """[..., K] and latent [N, K] -> [..., N], trained straight through both quantisers."""
    return _QuantizedProduct.apply(x, weight, kind, rounded(weight, kind))


class _TrainedQuantized(nn.Linear):
    """nn.Linear whose forward is quantised; the float weight is the latent one."""

    kind: str

    def forward(self, x: Tensor) -> Tensor:
        y = quantized_product(x, self.weight, self.kind)
        return y if self.bias is None else y + self.bias


class TernaryLinear(_TrainedQuantized):
    """BitNet b1.58 with a straight-through estimator: float32 latent [N, K], int8 activations per token."""

    kind = "ternary"


class Int8Linear(_TrainedQuantized):
    """Eight-bit weights by row and eight-bit activations per token, straight-through."""

    kind = "int8"


class PackedLinear(nn.Module):
    """One quantised operator of `op_table`, holding the bytes on disk. y as the table says, plus a float bias.

    `traced=False` (eager) unpacks the integers once and keeps them; `traced=True` calls the custom op, which an
    exporter turns into one node.
    """

    def __init__(self, kind: str, rows: int, columns: int, tensors: dict[str, Tensor], bias: Tensor | None):
        """`tensors`: `packed`, `scale` and, at int4, `multiplier`, as `packing` lays them out."""
        super().__init__()
        self.kind, self.rows, self.columns = kind, rows, columns
        for name in MATMUL_BY_KIND[kind].weight_names:
            self.register_buffer(name, tensors[name])
        self.register_buffer("bias", bias)
        self.traced = False
        self.tap: Tap | None = None
        self.sums_tap: Callable[[Tensor], None] | None = None
        self._integers: Tensor | None = None

    packed: Tensor
    scale: Tensor
    multiplier: Tensor
    bias: Tensor | None

    def __getstate__(self) -> dict[str, Any]:
        """A copy carries the bytes, neither what was unpacked from them nor who is listening."""
        return {**self.__dict__, "_integers": None, "tap": None, "sums_tap": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._integers = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self._integers = None
        super()._apply(fn, recurse)
        return self

    @property
    def weight_peak(self) -> int:
        return {"int8": 127, "int4": 7 * 255}.get(self.kind, 1)

    def integers(self) -> Tensor:
        """The integer weights as float32 [N, K], unpacked once (and again after a load or a move)."""
        if self._integers is None:
            # Kept beyond this call, so it must not be an inference tensor: gradients may pass through later ones.
            with torch.inference_mode(False):
                self._integers = self.unpack()
        return self._integers

    def unpack(self) -> Tensor:
        """The integer weights as float32 [N, K], unpacked now and not kept."""
        if self.kind in TERNARY_LAYOUTS:
            return torch_ops.unpack_ternary(self.packed, self.rows, *TERNARY_LAYOUTS[self.kind])
        if self.kind == "int8":
            return torch_ops.unpack_int8(self.packed)
        return torch_ops.unpack_int4(self.packed, self.multiplier, self.columns)

    def forward(self, x: Tensor) -> Tensor:
        y = self._node(x) if self.traced else self._eager(x)
        return y if self.bias is None else y + self.bias

    def _eager(self, x: Tensor) -> Tensor:
        with torch_ops.full_precision(x.device.type):
            codes, step = torch_ops.quantize_activations(x.float())
            if self.tap is not None:
                codes = self.tap(codes)
            sums = torch_ops.integer_sums(codes, self.integers(), self.weight_peak)
            if self.sums_tap is not None:
                self.sums_tap(sums)
            return torch_ops.scale_sums(sums, step, self.scale)

    def _node(self, x: Tensor) -> Tensor:
        if self.kind == "ternary2x4":
            return torch_ops.ternary_matmul_2x4(x, self.packed, self.scale, self.rows)
        if self.kind == "ternary3x5":
            return torch_ops.ternary_matmul_3x5(x, self.packed, self.scale, self.rows)
        if self.kind == "int8":
            return torch_ops.int8_matmul(x, self.packed, self.scale)
        return torch_ops.int4_matmul(x, self.packed, self.multiplier, self.scale)


class DenseTritLinear(nn.Module):
    """A ternary layer stored dense: trits in float16 or float32, the same activation codes and the same sums."""

    def __init__(self, trits: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.kind = "dense"
        self.rows, self.columns = trits.shape
        self.register_buffer("weight", trits.to(dtype))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.tap: Tap | None = None

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        with torch_ops.full_precision(x.device.type):
            codes, step = torch_ops.quantize_activations(x.float())
            if self.tap is not None:
                codes = self.tap(codes)
            y = torch_ops.scale_sums(F.linear(codes, self.weight.float()), step, self.scale)
        return y if self.bias is None else y + self.bias


class HalfLinear(nn.Module):
    """A float layer stored in float16 and computed in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.rows, self.columns = weight.shape
        self.register_buffer("weight", weight.half())
        self.register_buffer("bias", bias)

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float(), self.bias)


LinearFactory = Callable[[int, int, bool], nn.Module]
"""(in_features, out_features, bias) -> a layer."""


def linear_factory(bits: float) -> LinearFactory:
    """The training layer for a width of `QuantizationConfig`: 32, 8 or 1.58."""
    layer = {32: nn.Linear, 8: Int8Linear, 1.58: TernaryLinear}[bits]
    return lambda inputs, outputs, bias: layer(inputs, outputs, bias=bias)
