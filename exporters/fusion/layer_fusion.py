"""The two halves of a traced decoder layer as one node each: `AttentionInputs` and `FeedForward` of `layer_table`.

    x -> RMSNormalization -> products -> Add -> RotaryEmbedding        queries, keys and values
    mixed -> RMSNormalization -> product -> Add -> RMSNormalization -> products -> Sigmoid, Mul, Mul
          -> RMSNormalization -> product -> Add                        the output and the feed-forward part

A token of a small model spends its time between the products, and that of a large one waits for a thread at each. What
does not look like `model/decoder.py` wrote it stays as it is; so do layers whose widths the table does not take.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir
from onnx_ir import Node, Value

from microvlm.formats.layer_table import NORM_LANES, LayerSpec, attention_inputs_of, feed_forward_of
from microvlm.formats.op_spec import OpSpec
from microvlm.formats.op_table import DOMAIN, OPS


class _Norm(NamedTuple):
    x: Value
    weight: Value
    epsilon: float


class _Product(NamedTuple):
    """A product, with a bias where there is one."""

    x: Value
    op: OpSpec
    weights: list[Value]
    rows: int
    bias: Value | None = None


def fuse_layers(graph: onnx_ir.Graph) -> None:
    """Fuses layers in place; nodes without readers are not removed."""
    for node in list(graph):
        if node.op_type == "Attention" and node.domain == "":
            _fuse_inputs(graph, node)
    for node in list(graph):
        if node.op_type == "Add" and node.domain == "":
            _fuse_feed_forward(graph, node)


def _fuse_inputs(graph: onnx_ir.Graph, attention: Node) -> None:
    rotations = [_made_by(value, "RotaryEmbedding") for value in attention.inputs[:2]]
    query, key = rotations
    if query is None or key is None or list(query.inputs[1:]) != list(key.inputs[1:]):
        return
    products = [_product(value) for value in (query.inputs[0], key.inputs[0], attention.inputs[2])]
    norm = _norm(products[0].x) if products[0] else None
    if norm is None or any(product is None for product in products):
        return
    first, *others = [product for product in products if product is not None]
    layer = attention_inputs_of(first.op)
    if layer is None or any((each.op, each.x) != (first.op, first.x) for each in others):
        return
    if others[0].rows != others[1].rows or not _fits(norm.x.shape, norm.weight.shape):
        return
    nothing = _nothing(graph)
    weights = [norm.weight]
    for each in (first, *others):
        weights += [*each.weights, each.bias or nothing]
    attributes = {"query_rows": first.rows, "key_rows": others[0].rows}
    tables = [table for table in query.inputs[1:3] if table is not None]
    node = _node(layer, [norm.x, *tables, *weights], attributes, norm.epsilon)
    graph.insert_before(attention, node)
    for i, output in enumerate(node.outputs):
        _take_over(output, attention.inputs[i])


def _fuse_feed_forward(graph: onnx_ir.Graph, last: Node) -> None:
    """`last` adds the down product to the sum of x and the out product."""
    between, down = last.inputs[0], _product(last.inputs[1])
    middle = _made_by(between, "Add")
    out = _product(middle.inputs[1]) if middle else None
    if middle is None or down is None or out is None or down.bias or out.bias:
        return
    weighted, inner_norm = _unnormalized(down.x)
    mixed, mixed_norm = _unnormalized(out.x)
    gated = _gated(weighted)
    if gated is None:
        return
    gate, up = gated
    norm = _norm(gate.x)
    layer = feed_forward_of(gate.op)
    if norm is None or layer is None or norm.x is not between or up.x is not gate.x or gate.bias or up.bias:
        return
    if (
        any(each.op is not gate.op for each in (up, out, down))
        or gate.rows != up.rows
        or out.rows != down.rows
    ):
        return
    x, norms = middle.inputs[0], [each for each in (norm, inner_norm, mixed_norm) if each]
    lengths = [mixed.shape, *(each.weight.shape for each in norms)]
    if x is None or any(each.epsilon != norm.epsilon for each in norms) or not _fits(*lengths):
        return
    nothing = _nothing(graph)
    weights = [
        mixed_norm.weight if mixed_norm else nothing, *out.weights, norm.weight, *gate.weights, *up.weights,
        inner_norm.weight if inner_norm else nothing, *down.weights,
    ]  # fmt: skip
    attributes = {"rows": out.rows, "inner_rows": gate.rows}
    node = _node(layer, [mixed, x, *weights], attributes, norm.epsilon)
    graph.insert_before(last, node)
    _take_over(node.outputs[0], last.outputs[0])


def _gated(value: Value | None) -> tuple[_Product, _Product] | None:
    """silu(gate) * up -> (gate, up)."""
    times_up = _made_by(value, "Mul")
    silu = _made_by(times_up.inputs[0], "Mul") if times_up else None
    if times_up is None or silu is None:
        return None
    sigmoid = _made_by(silu.inputs[1], "Sigmoid")
    gate, up = _product(silu.inputs[0]), _product(times_up.inputs[1])
    if sigmoid is None or sigmoid.inputs[0] is not silu.inputs[0] or gate is None or up is None:
        return None
    return gate, up


def _product(value: Value | None) -> _Product | None:
    added = _made_by(value, "Add")
    bias = added.inputs[1] if added else None
    source = added.inputs[0] if added else value
    node = source.producer() if source is not None else None
    if node is None or node.domain != DOMAIN or node.op_type not in OPS or not OPS[node.op_type].is_ternary:
        return None
    if bias is not None and not bias.is_initializer():
        return None
    x, *weights = [operand for operand in node.inputs if operand is not None]
    return _Product(x, OPS[node.op_type], weights, node.attributes["rows"].as_int(), bias)


def _norm(value: Value | None) -> _Norm | None:
    node = _made_by(value, "RMSNormalization")
    if node is None or (node.attributes.get("axis") or onnx_ir.AttrInt64("axis", -1)).as_int() not in (-1, 2):
        return None
    x, weight = node.inputs
    epsilon = node.attributes.get("epsilon")
    if x is None or weight is None or epsilon is None:
        return None
    return _Norm(x, weight, epsilon.as_float())


def _unnormalized(value: Value) -> tuple[Value, _Norm | None]:
    norm = _norm(value)
    return (norm.x, norm) if norm else (value, None)


def _fits(*shapes: onnx_ir.Shape | None) -> bool:
    """Whether the table takes these widths."""
    widths = [shape[-1] if shape is not None else None for shape in shapes]
    return all(isinstance(width, int) and width % NORM_LANES == 0 for width in widths)


def _nothing(graph: onnx_ir.Graph) -> Value:
    """A constant of no elements, in place of a bias or a norm that a model does not have."""
    for node in graph:
        if node.op_type == "Constant" and node.outputs[0].name == "nothing":
            return node.outputs[0]
    node = onnx_ir.node("Constant", [], {"value": onnx_ir.Tensor(np.zeros(0, np.float32))})
    node.outputs[0].name = "nothing"
    graph.insert_before(graph[0], node)
    return node.outputs[0]


def _node(layer: LayerSpec, inputs: list[Value], attributes: dict[str, int], epsilon: float) -> Node:
    values = [onnx_ir.AttrInt64(name, attributes[name]) for name in layer.attributes]
    values.append(onnx_ir.AttrFloat32("epsilon", epsilon))
    return Node(DOMAIN, layer.name, inputs, values, num_outputs=len(layer.outputs))


def _take_over(new: Value, old: Value | None) -> None:
    """`new` is read, and named, in place of `old`."""
    assert old is not None
    new.name, old.name = old.name, None
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _made_by(value: Value | None, op_type: str) -> Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None
