"""Replaces the products of a traced graph by operators that others define, with the same integers and scales.

    matmulnbits   com.microsoft MatMulNBits: bits of 2, 4 or 8, accuracy_level 4 (int8 activations by block; without it
                  ONNX Runtime takes every weight apart at each call)
    qdq           DequantizeLinear of INT2, INT4 or INT8 weights by block, and MatMul. What runs it may make integer
                  products of the two, or multiply floats

Both round activations otherwise than our operators do, or not at all: they are for comparison, and for programs that
know neither our operators nor functions in a graph. Lookups of tokens keep our operators, and their functions.

Integer weights do not change. Ternary ones take 2 bits (4 where INT2 is not held) with the trit's scale for every
block, int4 ones 4 bits in groups of 32 with multiplier * scale, int8 ones 8 bits. Where MatMulNBits has the bytes of
our packing, as for the tied table, they keep their name and are stored once; `qdq` wants the transposed matrix and
stores the table again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir
from onnx_ir import DataType, Node, Value

from microvlm.errors import UserError
from microvlm.exporters.lowerings.onnx_support import support_of
from microvlm.formats.op_spec import OpSpec
from microvlm.formats.op_table import DOMAIN, OPS
from microvlm.formats.packing import GROUP, unpack_nibbles

MICROSOFT = "com.microsoft"
ACCURACY_LEVEL = 4
"""int8 activations. The schema of MatMulNBits has 0 unset, 1 float32, 2 float16, 3 bfloat16, 4 int8."""
BLOCKS = (128, 64, 32, 16)
"""Sizes of a block that ONNX Runtime has kernels for, the largest first: it has the fewest scales."""
_TYPES = {2: (DataType.INT2, DataType.INT4), 4: (DataType.INT4,), 8: (DataType.INT8,)}
"""Width -> types of qdq, of which the first one that is held is taken."""


class BlockWeights(NamedTuple):
    """A matrix as integers and a scale for each block of a row."""

    integers: np.ndarray
    """int8 [N, K], from -(2^(bits - 1)) on."""
    scales: np.ndarray
    """float32 [N, ceil(K / block)]."""
    bits: int
    block: int

    def floats(self) -> np.ndarray:
        """float32 [N, K]: what the matrix means."""
        return self.integers * np.repeat(self.scales, self.block, 1)[:, : self.integers.shape[1]]


def replace_products(model: onnx_ir.Model, lowering: str, columns: Mapping[str, int]) -> Counter[str]:
    """Replace every product of ours, in place -> how many became what.

    `columns`: K of each lowered layer by its name, because packed bytes may be padded. Raises UserError where the
    installed onnx and ONNX Runtime hold none of the types that qdq needs.
    """
    graph, counts = model.graph, Counter[str]()
    for node in list(graph):
        op = OPS.get(node.op_type) if node.domain == DOMAIN else None
        if op is None or op.is_lookup:
            continue
        packed = node.inputs[1]
        assert packed is not None
        assert packed.name is not None
        layer = packed.name.rpartition(".")[0]
        weights = block_weights(op, node, columns[layer])
        make = _nbits_nodes if lowering == "matmulnbits" else _qdq_nodes
        nodes = make(model, node, layer, weights, op)
        graph.insert_before(node, nodes)
        old, new = node.outputs[0], nodes[-1].outputs[0]
        new.name, old.name = old.name, None
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        stored = nodes[0].inputs[0]
        kind = f"{stored.dtype}" if lowering == "qdq" and stored is not None else f"{weights.bits} bits"
        counts[f"{' + '.join(each.op_type for each in nodes)}, {kind} by {weights.block}"] += 1
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    return counts


def block_weights(op: OpSpec, node: Node, columns: int) -> BlockWeights:
    """The weights of a product node, K = `columns`, without a change of their values."""
    tensors = [value.const_value for value in node.inputs[1:] if value is not None]
    *operands, scale = [tensor.numpy() for tensor in tensors if tensor is not None]
    if op.has_multiplier:
        packed, multiplier = operands
        return BlockWeights(
            unpack_nibbles(packed, columns), multiplier.astype(np.float32) * scale[:, None], 4, GROUP
        )
    rows = node.attributes["rows"].as_int() if "rows" in node.attributes else len(operands[0])
    integers = op.unpack(*operands, rows=rows, columns=columns).astype(np.int8)
    block = next((size for size in BLOCKS if columns % size == 0), GROUP)
    by_row = np.broadcast_to(scale.astype(np.float32), (rows,))
    scales = np.repeat(by_row[:, None], -(-columns // block), 1)
    return BlockWeights(integers, scales, 2 if op.is_ternary else 8, block)


def _nbits_nodes(
    model: onnx_ir.Model, node: Node, layer: str, weights: BlockWeights, op: OpSpec
) -> list[Node]:
    packed, old = pack_blocks(weights), node.inputs[1]
    assert old is not None
    assert old.const_value is not None
    same = packed.tobytes() == old.const_value.tobytes()
    operands = [
        _initializer(
            model.graph, f"{layer}.packed" if same else f"{layer}.packed_blocks", onnx_ir.Tensor(packed)
        ),
        _initializer(model.graph, f"{layer}.block_scales", onnx_ir.Tensor(weights.scales.reshape(-1))),
    ]
    rows, columns = weights.integers.shape
    model.graph.opset_imports[MICROSOFT] = 1
    attributes = {
        "K": columns,
        "N": rows,
        "bits": weights.bits,
        "block_size": weights.block,
        "accuracy_level": ACCURACY_LEVEL,
    }
    made = onnx_ir.node("MatMulNBits", [node.inputs[0], *operands], attributes, domain=MICROSOFT)
    return [made]


def _qdq_nodes(model: onnx_ir.Model, node: Node, layer: str, weights: BlockWeights, op: OpSpec) -> list[Node]:
    types = _TYPES[weights.bits]
    data_type, support = next(
        ((each, held) for each in types if (held := support_of(each))), (types[0], None)
    )
    if support is None:
        raise UserError(
            f"--lowering qdq needs {data_type.name} weights, which the installed onnx and onnxruntime do not hold "
            "together: upgrade them, or take --lowering matmulnbits."
        )
    imports = model.graph.opset_imports
    imports[""] = max(imports[""], support.opset)
    model.ir_version = max(model.ir_version, support.ir)
    integers = np.ascontiguousarray(weights.integers.T).astype(data_type.numpy())
    operands = [
        _initializer(model.graph, f"{layer}.integers", onnx_ir.Tensor(integers, dtype=data_type)),
        _initializer(
            model.graph, f"{layer}.block_scales", onnx_ir.Tensor(np.ascontiguousarray(weights.scales.T))
        ),
    ]
    floats = onnx_ir.node("DequantizeLinear", operands, {"axis": 0, "block_size": weights.block})
    floats.outputs[0].name = f"{layer}.floats"
    return [floats, onnx_ir.node("MatMul", [node.inputs[0], floats.outputs[0]])]


def _initializer(graph: onnx_ir.Graph, name: str, tensor: onnx_ir.Tensor) -> Value:
    """An initializer of this name; the one that is there is replaced, whose bytes are the same."""
    old = graph.initializers.pop(name, None)
    value = Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers[name] = value
    if old is not None:
        old.name = None
    return value


def pack_blocks(weights: BlockWeights) -> np.ndarray:
    """uint8 [N, blocks, block * bits / 8], K padded with zeros: MatMulNBits' own bytes, integers + 2^(bits - 1)."""
    rows, columns = weights.integers.shape
    width, middle, per_byte = (
        weights.scales.shape[1] * weights.block,
        1 << (weights.bits - 1),
        8 // weights.bits,
    )
    codes = np.full((rows, width), middle, np.uint8)
    codes[:, :columns] = weights.integers.astype(np.int16) + middle
    places = codes.reshape(rows, -1, weights.block // per_byte, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(weights.bits)
    return np.bitwise_or.reduce(places << shifts, axis=-1)
