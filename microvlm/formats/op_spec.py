"""One operator's entry in the table, and the exact numpy arithmetic that gives every operator its meaning.

All matrix products share one arithmetic (BitNet b1.58, Ma et al. 2024, arXiv 2402.17764, section 2), in this order,
every float step in IEEE float32 and none of them fused:

    absmax           = max(max |x[m, :]|, 1e-5)                    one per token (row of x)
    activations_q8   = clip(rint(x * (127 / absmax)), -128, 127)   int8, half to even
    activation_scale = absmax / 127
    acc              = sum over k of activations_q8[m, k] * w[n, k]           exact int32
    y                = float(acc) * (activation_scale * scale[n])  the bracket first, then one product per output

A token that holds a NaN or an infinity has activations_q8 of 0 and an activation_scale of NaN, so that each of its
outputs is NaN. Other tokens do not change for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from microvlm.formats import packing

ABSMAX_FLOOR = np.float32(1e-5)
Q8_MIN, Q8_MAX = np.float32(-128), np.float32(127)
MAX_COLUMNS = 65536
"""Most inputs of a row: the native kernels keep every intermediate sum inside int32 up to here."""

Pack = Callable[[np.ndarray], tuple[np.ndarray, ...]]
"""Integers [N, K] -> the operands before `scale`, in the operator's order."""
Unpack = Callable[..., np.ndarray]
"""(operands before `scale`, in the operator's order, rows=N, columns=K) -> integers [N, K]."""
Quantize = Callable[[np.ndarray], tuple[np.ndarray, ...]]
"""float32 [N, K] -> every weight operand, `scale` [N] last."""


@dataclass(frozen=True)
class Operand:
    """One input or output of an operator."""

    name: str
    dtype: str
    shape: str
    """Symbolic: M tokens, K inputs, N outputs, R packed rows, G groups, V vocabulary, S is 1 or N."""


@dataclass(frozen=True)
class OpSpec:
    """One operator: a matrix product (input `x`) or a table lookup (input `input_ids`)."""

    name: str
    """The ONNX operator type."""
    kind: str
    """The name that checkpoints use for this storage of weights; a product and a lookup of the same bytes share it."""
    torch_op: str
    """Name of the torch operator in the namespace `microvlm`."""
    bits: float
    """The width as users say it: --bits, --embedding-bits."""
    inputs: tuple[Operand, ...]
    output: Operand
    attributes: tuple[str, ...]
    """Integer attributes: `rows`, where packed rows are padded; `columns`, where packed columns are."""
    layout: str
    padding: str
    scale_shape: str
    float_order: str
    weight_absmax: int
    """Largest magnitude of an integer weight."""
    pack: Pack
    unpack: Unpack
    quantize: Quantize | None = None
    """None for ternary weights, which are made by training."""
    packing_name: str | None = None
    """A ternary packing's value of --packing."""
    trit_layout: packing.TernaryLayout | None = None
    """Layout of ternary bytes that are digits in planes, which torch and ONNX unpack by common code; else None."""
    rows_per_byte: int = 1
    columns_per_byte: int = 1
    group: int = 1
    """Columns are padded to a multiple of it; one multiplier each, where there are multipliers."""
    max_columns: int = MAX_COLUMNS

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Operands that a layer stores: `packed`, `multiplier` where there is one, `scale`."""
        return tuple(operand.name for operand in self.inputs[1:])

    @property
    def has_multiplier(self) -> bool:
        return "multiplier" in self.weight_names

    @property
    def is_lookup(self) -> bool:
        """Whether it gathers rows of a table; else it multiplies."""
        return self.inputs[0].dtype == "int64"

    @property
    def is_ternary(self) -> bool:
        return self.packing_name is not None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of a weight, padding and scales aside."""
        packed = 8 / (self.rows_per_byte * self.columns_per_byte)
        return packed + (8 / self.group if self.has_multiplier else 0)

    def weight_types(self, rows: int, columns: int, scales: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each weight operand of a matrix [rows, columns] with `scales` (1 or rows) scales."""
        groups = -(-columns // self.group)
        shapes = {
            "packed": (-(-rows // self.rows_per_byte), groups * self.group // self.columns_per_byte),
            "multiplier": (rows, groups),
            "scale": (scales,),
        }
        return {operand.name: (shapes[operand.name], operand.dtype) for operand in self.inputs[1:]}

    def reference(self, first: np.ndarray, *weights: np.ndarray, **attributes: int) -> np.ndarray:
        """The exact result in numpy. `first`: x float32 [..., K] or input_ids int64 [...]; `weights` as `weight_names`.

        Raises TypeError when operands or attributes are not this operator's.
        """
        if len(weights) != len(self.weight_names) or attributes.keys() != set(self.attributes):
            raise TypeError(f"{self.name} takes {self.weight_names} and attributes {self.attributes}")
        *operands, scale = weights
        if self.is_lookup:
            return self._lookup(first, operands, scale, **attributes)
        rows = attributes.get("rows", len(operands[0]))
        activations_q8, activation_scale = quantize_activations(first)
        sums = integer_sums(activations_q8, self.unpack(*operands, rows=rows, columns=first.shape[-1]))
        return sums.astype(np.float32) * (activation_scale * scale.astype(np.float32))

    def _lookup(
        self, input_ids: np.ndarray, operands: list[np.ndarray], scale: np.ndarray, columns: int | None = None
    ) -> np.ndarray:
        columns = operands[0].shape[1] if columns is None else columns
        flat = input_ids.reshape(-1)
        integers = self.unpack(*(operand[flat] for operand in operands), rows=len(flat), columns=columns)
        return (integers.astype(np.float32) * scale[flat][:, None]).reshape(*input_ids.shape, columns)


def quantize_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., K] -> (activations_q8 int8 [..., K], activation_scale float32 [..., 1] = absmax / 127).

    A row that is not finite has activations_q8 of 0 and an activation_scale of NaN.
    """
    finite = np.isfinite(x).all(-1, keepdims=True)
    x = np.where(finite, x, np.float32(0))
    absmax = np.maximum(np.abs(x).max(-1, keepdims=True), ABSMAX_FLOOR).astype(np.float32)
    activations_q8 = np.clip(np.rint(x * (Q8_MAX / absmax)), Q8_MIN, Q8_MAX).astype(np.int8)
    return activations_q8, np.where(finite, absmax / Q8_MAX, np.float32(np.nan))


def integer_sums(activations_q8: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """int8 [..., K] times integers [N, K] -> exact int32 [..., N]."""
    return np.matmul(activations_q8.astype(np.int64), weights.T.astype(np.int64)).astype(np.int32)
