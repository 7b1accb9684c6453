"""Linear layers: trained in float or straight through quantisers, and stored packed, dense or half.

Training layers hold float weights and share nn.Linear's constructor: `nn.Linear`, `TernaryLinear` (BitNet b1.58),
`Int8Linear`. Stored layers hold the bytes of an exported graph: `PackedLinear`, `DenseTritLinear` (trits at 16 or 32
bits) and `HalfLinear`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.formats.op_spec import OpSpec
from microvlm.formats.op_table import INT8_MATMUL, MATMUL_BY_KIND, TERNARY_2X4
from microvlm.model import torch_ops

Tap = Callable[[Tensor], Tensor]
"""Receives one layer's activations_q8 (as float32 integers) and returns those to use: record or replay."""

TRAINED_ABSMAX = {"ternary": TERNARY_2X4.weight_absmax, "int8": INT8_MATMUL.weight_absmax}
"""Kind of a training layer -> largest magnitude of its integer weights."""


TERNARY_SCALE_FLOOR = 1e-5
"""Least scale of a ternary matrix: a matrix of zeros has a scale to divide by."""


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [N, K] -> (trits as floats [N, K], g [1]): g = mean |W| (>= 1e-5), trits = clip(round(W / g), -1, 1)."""
    scale = weight.detach().abs().mean().clamp(min=TERNARY_SCALE_FLOOR).reshape(1)
    return (weight / scale).round_().clamp_(-1.0, 1.0), scale


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [N, K] -> (integers as floats in -127..127, scale [N]): a row's absmax at 127."""
    scale = weight.detach().abs().amax(1).clamp(min=1e-8) / 127.0
    return (weight / scale[:, None]).round_().clamp_(-127.0, 127.0), scale


Quantized = tuple[Tensor, Tensor]
"""Integers and their scale. The integers are int8 where `multiplies_int8` says so, else float32."""


class _QuantizedProduct(torch.autograd.Function):
    """The integer product of `op_table` forward; straight through both quantisers backward (Bengio et al. 2013)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, kind: str, activations: Quantized, quantized: Quantized
    ) -> Tensor:
        """`activations` are those of x, `quantized` those of `weight`."""
        activations_q8, activation_scale = activations
        integers, scale = quantized
        # A frozen weight needs no activations, which are most of what a step keeps.
        kept = activations_q8 if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, activation_scale, integers, scale)
        ctx.dtype = x.dtype
        # bfloat16 holds every int8 activation and weight exactly; only the gradient itself is rounded.
        ctx.low = torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else torch.float32
        # Autocast would round the sums; exact ones make training the very function that is shipped.
        with torch_ops.full_precision(x.device.type):
            if integers.dtype == torch.int8:
                sums = torch_ops.int8_sums(activations_q8, integers)
            else:
                sums = torch_ops.integer_sums(activations_q8, integers, TRAINED_ABSMAX[kind])
        return torch_ops.scale_sums(sums, activation_scale, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        activations_q8, activation_scale, integers, scale = ctx.saved_tensors
        grad = grads[0].float()
        low = ctx.low
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = ((grad * scale).to(low) @ integers.to(low)).to(ctx.dtype)
        if activations_q8 is not None:
            weighted = (grad * activation_scale).to(low).flatten(0, -2)
            grad_weight = (weighted.T @ activations_q8.to(low).flatten(0, -2)).float()
        return grad_x, grad_weight, None, None, None


class _StepCache:
    """What products of one step share: the integers of weights, and those of the newest input."""

    def __init__(self) -> None:
        self.weights: dict[tuple[int, str], tuple[Tensor, Quantized]] = {}
        """(id of a weight, kind) -> the weight, so that its id stays its own, and its integers and scale."""
        self.input: tuple[Tensor, int, Quantized] | None = None
        """The newest input, its version, and its integers: queries, keys and values have one input, gate and up too."""


_step_cache: ContextVar[_StepCache | None] = ContextVar("_step_cache", default=None)


@contextmanager
def weights_rounded_once() -> Iterator[None]:
    """Round every latent weight once inside the block, however many products use it. Weights must not change there."""
    token = _step_cache.set(_StepCache())
    try:
        yield
    finally:
        _step_cache.reset(token)


def quantize_weight(weight: Tensor, kind: str) -> Quantized:
    """float [N, K] -> (integers [N, K], scale) for a training layer of `kind`, without gradient."""
    cache = _step_cache.get()
    if cache is not None and (id(weight), kind) in cache.weights:
        return cache.weights[id(weight), kind][1]
    with torch.no_grad():
        integers, scale = ternarize(weight) if kind == "ternary" else int8_rows(weight)
        if torch_ops.multiplies_int8(weight.device.type):
            integers = integers.to(torch.int8)
    if cache is not None:
        cache.weights[id(weight), kind] = weight, (integers, scale)
    return integers, scale


def _quantize_input(x: Tensor) -> Quantized:
    """[..., K] -> (activations_q8 [..., K], activation_scale [..., 1]), without gradient."""
    cache = _step_cache.get()
    if cache is None or x.is_inference():
        return _quantize_new_input(x)
    if cache.input is None or cache.input[0] is not x or cache.input[1] != x._version:
        cache.input = x, x._version, _quantize_new_input(x)
    return cache.input[2]


@torch.no_grad()
def _quantize_new_input(x: Tensor) -> Quantized:
    activations_q8, scale = torch_ops.quantize_activations(x.float())
    if not torch_ops.multiplies_int8(x.device.type):
        return activations_q8, scale
    # int8 has no NaN: the scale alone must make every output of a row NaN that is not finite, an infinite one too.
    return activations_q8.to(torch.int8), scale + (scale - scale)


def quantized_product(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    """[..., K] and latent [N, K] -> [..., N], trained straight through both quantisers."""
    return _QuantizedProduct.apply(x, weight, kind, _quantize_input(x), quantize_weight(weight, kind))


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
    """One quantised matrix of `op_table`, stored as the bytes of a bundle. y as the table says, plus a float bias.

    `traced=False` (eager) unpacks the integers once and keeps them; `traced=True` calls the torch operator, which an
    exporter turns into one node.
    """

    def __init__(self, kind: str, rows: int, columns: int, tensors: dict[str, Tensor], bias: Tensor | None):
        """`tensors`: the kind's weight operands by name, as `OpSpec.weight_types` shapes them."""
        super().__init__()
        self.kind, self.rows, self.columns = kind, rows, columns
        for name in self.op.weight_names:
            self.register_buffer(name, tensors[name])
        self.register_buffer("bias", bias)
        self.traced = False
        self.tap: Tap | None = None
        self.sums_tap: Callable[[Tensor], None] | None = None
        self._integers: Tensor | None = None

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    @property
    def op(self) -> OpSpec:
        """The matrix product of this kind of storage."""
        return MATMUL_BY_KIND[self.kind]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weight operands by name, in the operator's order."""
        return {name: self.get_buffer(name) for name in self.op.weight_names}

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy: without unpacked integers and taps."""
        return {**self.__dict__, "_integers": None, "tap": None, "sums_tap": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._integers = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self._integers = None
        super()._apply(fn, recurse)
        return self

    def integers(self) -> Tensor:
        """The integer weights as float32 [N, K], unpacked once (and again after a load or a move)."""
        if self._integers is None:
            # Kept beyond this call, so it must not be an inference tensor: gradients may pass through later ones.
            with torch.inference_mode(False):
                self._integers = self.unpack()
        return self._integers

    def unpack(self) -> Tensor:
        """The integer weights as float32 [N, K], unpacked now and not kept."""
        *operands, _ = self.weights.values()
        return torch_ops.unpack(self.op, *operands, rows=self.rows, columns=self.columns)

    def forward(self, x: Tensor) -> Tensor:
        y = self._node(x) if self.traced else self._eager(x)
        return y if self.bias is None else y + self.bias

    def _eager(self, x: Tensor) -> Tensor:
        with torch_ops.full_precision(x.device.type):
            activations_q8, activation_scale = torch_ops.quantize_activations(x.float())
            if self.tap is not None:
                activations_q8 = self.tap(activations_q8)
            sums = torch_ops.integer_sums(activations_q8, self.integers(), self.op.weight_absmax)
            if self.sums_tap is not None:
                self.sums_tap(sums)
            return torch_ops.scale_sums(sums, activation_scale, self.scale)

    def _node(self, x: Tensor) -> Tensor:
        return torch_ops.call(self.op, x, self.weights, self.rows, self.columns)


class DenseTritLinear(nn.Module):
    """A ternary layer stored dense: trits in float16 or float32, the same activations_q8 and sums."""

    def __init__(self, trits: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.kind = "dense"
        self.rows, self.columns = trits.shape
        self.register_buffer("weight", trits.to(dtype))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.tap: Tap | None = None
        self.sums_tap: Callable[[Tensor], None] | None = None

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        with torch_ops.full_precision(x.device.type):
            activations_q8, activation_scale = torch_ops.quantize_activations(x.float())
            if self.tap is not None:
                activations_q8 = self.tap(activations_q8)
            sums = F.linear(activations_q8, self.weight.float())
            if self.sums_tap is not None:
                self.sums_tap(sums)
            y = torch_ops.scale_sums(sums, activation_scale, self.scale)
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
