"""THE table of fused layers: the two halves of a decoder layer around its attention, each as one node, and its mask.

A node joins products of `op_table`, whose arithmetic does not change, with the float steps between them. Every step is
IEEE float32, none fused, in this order:

    norm(x, w)         lanes[j] = x[j]^2 + x[j + 32]^2 + x[j + 64]^2 + ...      in this order, for j < 32
                       total    = lanes[0] + lanes[1] + ... + lanes[31]        in this order
                       y        = (x * sqrt(1 / (total / K + epsilon))) * w
    exp(x)             x = max(min(x, 88), -87);  n = rint(x * 1.44269502)
                       r = (x - n * .693359375) - n * -2.12194442e-4
                       p = ((((c0 r + c1) r + c2) r + c3) r + c4) r + c5       `EXPONENTIAL`
                       y = ((p * (r * r) + r) + 1) * 2^n                       Cephes' expf (Moshier 1989)
    silu(x)            x / (1 + exp(-x))
    rotate(a, b)       a * cos - b * sin,  b * cos + a * sin                   the two halves of a head

    AttentionInputs    h = norm(x);  query = rotate(h Wq + bq);  key = rotate(h Wk + bk);  value = h Wv + bv
    FeedForward        y = x + norm(mixed) Wo;  h = norm(y);  y + norm(silu(h Wg) * (h Wu)) Wd

    DecoderMask        visible[b, 0, s, t] = (mask[b, t] and t <= own) or t == own,  own = s + T - S
    RotateBlocks       each block of `width` columns, for h = 1, 2, 4, ... below `width`: y[j], y[j + h] =
                       y[j] + y[j + h], y[j] - y[j + h] for all j with no bit h;  then y * (1 / sqrt(width))

A bias, and a norm before Wo or Wd, of no elements is none. Activations are [batch, tokens, width], widths multiples of
32. The names of the nodes are part of the bundle format: a changed arithmetic or operand is a new name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from microvlm.formats.op_spec import Operand, OpSpec
from microvlm.formats.op_table import TERNARY_2X4, TERNARY_3X5

NORM_LANES = 32
EXPONENTIAL = (1.98756912e-4, 1.39819994e-3, 8.33345205e-3, 4.16657962e-2, 1.66666657e-1, 5.0e-1)
"""c0 .. c5."""
LOG2_E, LN2_HIGH, LN2_LOW = 1.44269502, 0.693359375, -2.12194442e-4
LEAST_EXPONENT, MOST_EXPONENT = -87.0, 88.0


@dataclass(frozen=True)
class LayerSpec:
    """One fused layer."""

    name: str
    product: OpSpec
    """The operator of each of its products."""
    activations: tuple[Operand, ...]
    weights: tuple[Operand, ...]
    """All are initializers."""
    outputs: tuple[str, ...]
    attributes: tuple[str, ...]
    """Integers: rows of packed matrices. `epsilon`, a float, is an attribute of every layer."""

    @property
    def inputs(self) -> tuple[Operand, ...]:
        return self.activations + self.weights

    @property
    def products(self) -> int:
        """How many products a node holds."""
        return sum(operand.name.endswith("_packed") for operand in self.weights)

    def reference(self, *inputs: np.ndarray, epsilon: float, **rows: int) -> tuple[np.ndarray, ...]:
        """The exact result in numpy: the outputs, of `inputs` in the table's order."""
        by_name = {operand.name: array for operand, array in zip(self.inputs, inputs, strict=True)}
        run = _attention_inputs if self.outputs == ATTENTION_OUTPUTS else _feed_forward
        return run(self.product, by_name, np.float32(epsilon), **rows)


ATTENTION_OUTPUTS = ("query", "key", "value")


def _matrix(product: OpSpec, name: str, rows: str, columns: str) -> tuple[Operand, Operand]:
    return (
        Operand(f"{name}_packed", "uint8", f"[ceil({rows} / {product.rows_per_byte}), {columns}]"),
        Operand(f"{name}_scale", "float32", f"[1] or [{rows}]"),
    )


def _optional(name: str, length: str) -> Operand:
    return Operand(name, "float32", f"[0] or [{length}]")


def _layers(product: OpSpec, suffix: str) -> tuple[LayerSpec, LayerSpec]:
    projections = [
        (*_matrix(product, name, rows, "K"), _optional(f"{name}_bias", rows))
        for name, rows in (("query", "Q"), ("key", "V"), ("value", "V"))
    ]
    tables = (Operand(name, "float32", "[B, S, D / 2]") for name in ("cosine", "sine"))
    attention_inputs = LayerSpec(
        name=f"AttentionInputs{suffix}",
        product=product,
        activations=(Operand("x", "float32", "[B, S, K]"), *tables),
        weights=(Operand("norm", "float32", "[K]"), *(operand for each in projections for operand in each)),
        outputs=ATTENTION_OUTPUTS,
        attributes=("query_rows", "key_rows"),
    )
    feed_forward = LayerSpec(
        name=f"FeedForward{suffix}",
        product=product,
        activations=(Operand("mixed", "float32", "[B, S, A]"), Operand("x", "float32", "[B, S, H]")),
        weights=(
            _optional("mixed_norm", "A"),
            *_matrix(product, "out", "H", "A"),
            Operand("norm", "float32", "[H]"),
            *_matrix(product, "gate", "F", "H"),
            *_matrix(product, "up", "F", "H"),
            _optional("inner_norm", "F"),
            *_matrix(product, "down", "H", "F"),
        ),
        outputs=("y",),
        attributes=("rows", "inner_rows"),
    )
    return attention_inputs, feed_forward


LAYERS: dict[str, LayerSpec] = {
    layer.name: layer
    for layers in zip(_layers(TERNARY_2X4, "2x4"), _layers(TERNARY_3X5, "3x5"), strict=True)
    for layer in layers
}
"""Node type -> layer, in the order of the C++ declarations."""


def attention_inputs_of(product: OpSpec) -> LayerSpec | None:
    """The layer before an attention whose products are `product`, where there is one."""
    return _layer_of(product, ATTENTION_OUTPUTS)


def feed_forward_of(product: OpSpec) -> LayerSpec | None:
    """The layer behind an attention whose products are `product`, where there is one."""
    return _layer_of(product, ("y",))


def _layer_of(product: OpSpec, outputs: tuple[str, ...]) -> LayerSpec | None:
    found = (layer for layer in LAYERS.values() if (layer.product, layer.outputs) == (product, outputs))
    return next(found, None)


MASK = "DecoderMask"
"""int64 attention_mask [B, T] and position_ids [B, S], of which the sizes alone count -> bool [B, 1, S, T]."""


def decoder_mask(attention_mask: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
    """The visible positions in numpy."""
    total, queries = attention_mask.shape[1], position_ids.shape[1]
    keys = np.arange(total)
    own = np.arange(queries)[:, None] + (total - queries)
    return ((attention_mask != 0)[:, None, None] & (keys <= own)) | (keys == own)


ROTATION = "RotateBlocks"
"""float32 x [..., K] -> the same shape; attribute `width`, a power of four that divides K, of at most MAX_ROTATION."""
MAX_ROTATION = 64


def rotate_blocks(x: np.ndarray, width: int) -> np.ndarray:
    """Blocks of `width` columns times Sylvester's orthonormal Hadamard matrix (Fino and Algazi 1976), in numpy."""
    y, stride = x, 1
    while stride < width:
        pairs = y.reshape(-1, 2, stride)
        y = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        stride *= 2
    return (y * np.float32(width**-0.5)).reshape(x.shape)


def products_of(op_type: str) -> int:
    """How many ternary products a node of this type holds: 0 where it is neither a product nor a fused layer."""
    return LAYERS[op_type].products if op_type in LAYERS else int(op_type in _TERNARY)


_TERNARY = (TERNARY_2X4.name, TERNARY_3X5.name)


def normalize(x: np.ndarray, weight: np.ndarray, epsilon: np.float32) -> np.ndarray:
    """float32 [..., K] -> its norm, in the table's order."""
    squares = (x * x).reshape(*x.shape[:-1], x.shape[-1] // NORM_LANES, NORM_LANES)
    lanes = np.add.accumulate(squares, axis=-2)[..., -1, :]
    total = np.add.accumulate(lanes, axis=-1)[..., -1:]
    with np.errstate(over="ignore"):
        factor = np.sqrt(np.float32(1) / (total / np.float32(x.shape[-1]) + epsilon))
    return (x * factor) * weight


def exponential(x: np.ndarray) -> np.ndarray:
    """float32 -> float32, in the table's order."""
    x = np.maximum(np.minimum(x, np.float32(MOST_EXPONENT)), np.float32(LEAST_EXPONENT))
    n = np.rint(x * np.float32(LOG2_E))
    r = (x - n * np.float32(LN2_HIGH)) - n * np.float32(LN2_LOW)
    p = np.full_like(r, EXPONENTIAL[0])
    for coefficient in EXPONENTIAL[1:]:
        p = p * r + np.float32(coefficient)
    return ((p * (r * r) + r) + np.float32(1)) * np.exp2(n).astype(np.float32)


def rotate(x: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    """float32 [B, S, heads * D] and tables [B, S, D / 2] -> the rotated heads."""
    half = cosine.shape[-1]
    heads = x.reshape(*x.shape[:2], x.shape[-1] // (2 * half), 2, half)
    first, second = heads[..., 0, :], heads[..., 1, :]
    cosine, sine = cosine[:, :, None], sine[:, :, None]
    turned = np.stack([first * cosine - second * sine, second * cosine + first * sine], axis=-2)
    return turned.reshape(x.shape)


def _attention_inputs(
    product: OpSpec, inputs: dict[str, np.ndarray], epsilon: np.float32, query_rows: int, key_rows: int
) -> tuple[np.ndarray, ...]:
    hidden = normalize(inputs["x"], inputs["norm"], epsilon)
    outputs = []
    for name, rows in zip(ATTENTION_OUTPUTS, (query_rows, key_rows, key_rows), strict=True):
        y = _multiply(product, inputs, name, hidden, rows)
        if inputs[f"{name}_bias"].size:
            y = y + inputs[f"{name}_bias"]
        outputs.append(y if name == "value" else rotate(y, inputs["cosine"], inputs["sine"]))
    return tuple(outputs)


def _feed_forward(
    product: OpSpec, inputs: dict[str, np.ndarray], epsilon: np.float32, rows: int, inner_rows: int
) -> tuple[np.ndarray, ...]:
    def normalized(x: np.ndarray, name: str) -> np.ndarray:
        return normalize(x, inputs[name], epsilon) if inputs[name].size else x

    y = inputs["x"] + _multiply(product, inputs, "out", normalized(inputs["mixed"], "mixed_norm"), rows)
    hidden = normalized(y, "norm")
    gate = _multiply(product, inputs, "gate", hidden, inner_rows)
    with np.errstate(invalid="ignore"):
        inner = gate / (np.float32(1) + exponential(-gate))
    inner = normalized(inner * _multiply(product, inputs, "up", hidden, inner_rows), "inner_norm")
    return (y + _multiply(product, inputs, "down", inner, rows),)


def _multiply(product: OpSpec, inputs: dict[str, np.ndarray], name: str, x: np.ndarray, rows: int) -> Any:
    return product.reference(x, inputs[f"{name}_packed"], inputs[f"{name}_scale"], rows=rows)
