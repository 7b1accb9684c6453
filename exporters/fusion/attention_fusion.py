"""The attention of a traced graph as ONNX's own operators: a third of the tracer's nodes, and no cache written twice.

    q, k = RotaryEmbedding(q), RotaryEmbedding(k);  y, present_k, present_v = Attention(q, k, v, mask, past_k, past_v)

The tracer splits heads by Reshape and Transpose, rotates by Slice, Neg, Concat, Mul and Add and appends to the cache by
Concat: forty nodes a layer, each some thousand instructions of a small processor whatever it computes. Both operators
take heads side by side, [B, S, heads * D]. What does not look like `attention.py` wrote it stays as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir
from onnx_ir import Value

HEADS_FIRST = (0, 2, 1, 3)
"""[B, S, heads, D] to [B, heads, S, D], and back."""


class _Heads(NamedTuple):
    """One operand of an attention, before heads were split."""

    flat: Value
    """[B, S, heads * D]."""
    heads: int
    tables: tuple[Value, Value] | None
    """Cosine and sine [B, S, D / 2], where it is rotated."""
    past: Value | None
    """[B, heads, P, D]."""


def fuse_attention(graph: onnx_ir.Graph) -> None:
    """Fuses attention in place. Shapes of inner values must be known; nodes without readers are not removed."""
    for node in list(graph):
        if node.op_type == "Attention" and node.domain == "":
            _fuse(graph, node)


def _fuse(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    operands = [_heads(value) for value in node.inputs[:3]]
    output = _merged(node.outputs[0])
    if output is None or any(operand is None for operand in operands):
        return
    query, key, value = (operand for operand in operands if operand is not None)
    if query.past is not None or (key.past is None) != (value.past is None):
        return
    attributes = {**node.attributes, **_integers(q_num_heads=query.heads, kv_num_heads=key.heads)}
    inputs: list[Value | None] = [
        _rotated(graph, node, query),
        _rotated(graph, node, key),
        _rotated(graph, node, value),
    ]
    inputs += [node.inputs[3] if len(node.inputs) > 3 else None, key.past, value.past]
    while inputs[-1] is None:
        inputs.pop()
    fused = onnx_ir.Node("", "Attention", inputs, attributes, num_outputs=1 if key.past is None else 3)
    graph.insert_before(node, fused)
    _take_over(fused.outputs[0], output)
    for state, old in zip(fused.outputs[1:], node.inputs[1:3], strict=False):
        assert old is not None
        _take_over(state, old)


def _heads(value: Value | None) -> _Heads | None:
    """Back from [B, heads, T, D] to where it was one linear's output, over a cache and a rotation if there are any."""
    past = None
    if (
        (joined := _made_by(value, "Concat"))
        and len(joined.inputs) == 2
        and joined.attributes["axis"].value == 2
    ):
        past, value = joined.inputs
    tables = None
    if turned := _rotation(value):
        value, tables = turned
    transpose = _made_by(value, "Transpose")
    if transpose is None or tuple(transpose.attributes["perm"].value) != HEADS_FIRST:
        return None
    reshape = _made_by(transpose.inputs[0], "Reshape")
    heads = None if value is None or value.shape is None else value.shape[1]
    if reshape is None or not isinstance(heads, int):
        return None
    flat = reshape.inputs[0]
    return (
        None
        if flat is None or flat.shape is None or len(flat.shape) != 3
        else _Heads(flat, heads, tables, past)
    )


def _rotation(value: Value | None) -> tuple[Value, tuple[Value, Value]] | None:
    """x * cos + concat(-x[half:], x[:half]) * sin -> (x, tables)."""
    total = _made_by(value, "Add")
    products = [_made_by(term, "Mul") for term in total.inputs] if total else []
    if len(products) != 2 or products[0] is None or products[1] is None:
        return None
    x, cosine = products[0].inputs
    turned, sine = products[1].inputs
    halves = _made_by(turned, "Concat")
    negated = _made_by(halves.inputs[0], "Neg") if halves else None
    upper = _made_by(negated.inputs[0], "Slice") if negated else None
    lower = _made_by(halves.inputs[1], "Slice") if halves and len(halves.inputs) == 2 else None
    if upper is None or lower is None or upper.inputs[0] is not x or lower.inputs[0] is not x:
        return None
    if x is None or x.shape is None or not isinstance(width := x.shape[-1], int):
        return None
    if _begin_and_end(upper, width) != (width // 2, width) or _begin_and_end(lower, width) != (0, width // 2):
        return None
    tables = _table(cosine, "Cos"), _table(sine, "Sin")
    if tables[0] is None or tables[1] is None:
        return None
    return x, (tables[0], tables[1])


def _begin_and_end(cut: onnx_ir.Node, width: int) -> tuple[int, int] | None:
    """Returns (begin, end) of a Slice of the last axis with step 1, or None for any other Slice."""
    bounds = [
        None if value is None else onnx_ir.convenience.get_const_tensor(value) for value in cut.inputs[1:]
    ]
    if len(bounds) != 4 or any(bound is None or bound.size != 1 for bound in bounds):
        return None
    begin, end, axis, step = (int(bound.numpy().item()) for bound in bounds if bound is not None)
    return (begin, min(end, width)) if axis in (3, -1) and step == 1 else None


def _table(value: Value | None, function: str) -> Value | None:
    """function(unsqueeze(concat(angles, angles))) [B, 1, S, D] -> function(angles) [B, S, D / 2], made once."""
    function_node = _made_by(value, function)
    spread = _made_by(function_node.inputs[0], "Unsqueeze") if function_node else None
    twice = _made_by(spread.inputs[0], "Concat") if spread else None
    if (
        function_node is None
        or twice is None
        or len(twice.inputs) != 2
        or twice.inputs[0] is not twice.inputs[1]
    ):
        return None
    angles = twice.inputs[0]
    assert angles is not None
    for use in angles.uses():
        if use.node.op_type == function:
            return use.node.outputs[0]
    half = onnx_ir.Node("", function, [angles])
    assert function_node.graph is not None
    function_node.graph.insert_before(function_node, half)
    half.outputs[0].name = f"{function.lower()}_half"
    return half.outputs[0]


def _rotated(graph: onnx_ir.Graph, before: onnx_ir.Node, operand: _Heads) -> Value:
    if operand.tables is None:
        return operand.flat
    turn = onnx_ir.Node(
        "", "RotaryEmbedding", [operand.flat, *operand.tables], _integers(num_heads=operand.heads)
    )
    graph.insert_before(before, turn)
    turn.outputs[0].name = f"{operand.flat.name}_rotated"
    return turn.outputs[0]


def _merged(value: Value) -> Value | None:
    """Forward from [B, heads, S, D] to where heads lie side by side again."""
    for op_type in ("Transpose", "Reshape"):
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type != op_type or uses[0].idx != 0:
            return None
        value = uses[0].node.outputs[0]
    return value


def _take_over(new: Value, old: Value) -> None:
    """`new` is read, and named, in place of `old`."""
    new.name, old.name = old.name, None
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _made_by(value: Value | None, op_type: str) -> onnx_ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _integers(**values: int) -> dict[str, onnx_ir.Attr]:
    return {name: onnx_ir.AttrInt64(name, value) for name, value in values.items()}
