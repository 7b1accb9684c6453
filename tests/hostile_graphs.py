"""Sends hostile graphs of one `ai.microvlm` node through ONNX Runtime: `hostile_graphs.py LIBRARY CASES SEED`.

A program of its own, because what it looks for would end the process. It prints a JSON line for each graph.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import np_dtype_to_tensor_dtype

from microvlm.formats.op_spec import OpSpec
from microvlm.formats.op_table import DOMAIN, DOMAIN_VERSION, OPS

ROWS, COLUMNS = 13, 40
NUMBERS = (-(2**63), -1, 0, 1, 12, 14, 39, 41, 64, 200_000, 2**31, 2**62, 2**63 - 1)
TYPES = ("float32", "float64", "float16", "int8", "uint8", "int32", "int64", "bool")


@dataclass(frozen=True)
class Node:
    """A node and its inputs; those that are no initializers are inputs of the graph."""

    op: OpSpec
    inputs: dict[str, np.ndarray]
    attributes: dict[str, Any]
    initializers: frozenset[str]
    names: tuple[str, ...] = ()
    """What the node takes, where that is not every input in order."""
    declared: dict[str, list[Any] | None] = field(default_factory=dict)
    """Shapes that the graph claims, where they are not unknown."""

    def run(self, library: str) -> np.ndarray:
        node = helper.make_node(
            self.op.name, self.names or list(self.inputs), ["y"], domain=DOMAIN, **self.attributes
        )
        tensors = [numpy_helper.from_array(self.inputs[name], name) for name in sorted(self.initializers)]
        dynamic = {name: value for name, value in self.inputs.items() if name not in self.initializers}
        values = [
            helper.make_tensor_value_info(
                name, np_dtype_to_tensor_dtype(value.dtype), self.declared.get(name, [None] * value.ndim)
            )
            for name, value in dynamic.items()
        ]
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph([node], "hostile", values, [output], tensors)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return session.run(None, dynamic)[0]

    def expected(self) -> np.ndarray | None:
        """The table's result; None where the inputs are not what the table says."""
        op, (first, *weights) = self.op, self.inputs.values()
        names = [operand.name for operand in op.inputs]
        if list(self.names or self.inputs) != names or not set(op.attributes) <= set(self.attributes):
            return None
        # ONNX Runtime lets a custom operator have attributes that it does not know, and holds inputs against the graph.
        attributes = [self.attributes[name] for name in op.attributes]
        if not all(isinstance(value, int) for value in attributes):
            return None
        if any(shape is not None for shape in self.declared.values()):
            return None
        types = {operand.name: operand.dtype for operand in op.inputs}
        if any(self.inputs[name].dtype != types[name] for name in names):
            return None
        packed = weights[0]
        if packed.ndim != 2 or first.ndim < (0 if op.is_lookup else 1):
            return None
        rows = attributes[0] if "rows" in op.attributes else packed.shape[0]
        if op.is_lookup:
            columns = attributes[0] if attributes else packed.shape[1]
            fits = ((first >= -rows) & (first < rows)).all() and columns >= 0
        else:
            columns = first.shape[-1]
            fits = 1 <= columns <= op.max_columns
        scales = (rows,) if op.is_lookup else (rows, 1)
        shapes = [value.shape for value in weights]
        if not fits or rows < 0 or first.ndim > 15:
            return None
        if all(shapes != [shape for shape, _ in op.weight_types(rows, columns, s).values()] for s in scales):
            return None
        shape = (*first.shape, columns) if op.is_lookup else (*first.shape[:-1], rows)
        if 0 in shape:
            return np.zeros(shape, np.float32)
        return op.reference(first, *weights, **dict(zip(op.attributes, attributes, strict=True)))


def right_node(op: OpSpec, is_constant: bool = True, seed: int = 0) -> Node:
    rng = np.random.default_rng(seed)
    types = op.weight_types(ROWS, COLUMNS, ROWS)
    weights = {
        name: rng.uniform(0.1, 1, shape).astype(np.float32)
        if dtype == "float32"
        else rng.integers(0, 256, shape, np.uint8)
        for name, (shape, dtype) in types.items()
    }
    if op.is_ternary:
        (weights["packed"],) = op.pack(rng.integers(-1, 2, (ROWS, COLUMNS)).astype(np.int8))
    first = rng.integers(-ROWS, ROWS, (2, 3)) if op.is_lookup else rng.normal(size=(2, 3, COLUMNS))
    inputs = {op.inputs[0].name: first.astype(op.inputs[0].dtype), **weights}
    attributes = {name: {"rows": ROWS, "columns": COLUMNS}[name] for name in op.attributes}
    return Node(op, inputs, attributes, frozenset(weights if is_constant else ()))


def with_input(node: Node, name: str, value: np.ndarray) -> Node:
    return replace(node, inputs={**node.inputs, name: value})


def resized(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The elements repeated or cut to a shape."""
    return np.resize(value, shape) if value.size else np.zeros(shape, value.dtype)


def reshaped(node: Node) -> Iterator[tuple[str, Node]]:
    """Every input with each dimension changed, with a dimension more, with one less, and empty."""
    for name, value in node.inputs.items():
        shapes = [(*value.shape, 1), (1, *value.shape), value.shape[1:], value.shape[:-1], (0,), ()]
        for axis, size in enumerate(value.shape):
            for number in {0, 1, max(0, size - 1), size + 1, 2 * size}:
                shapes.append((*value.shape[:axis], number, *value.shape[axis + 1 :]))
        for shape in shapes:
            yield f"{name} of shape {list(shape)}", with_input(node, name, resized(value, shape))
    first = node.op.inputs[0].name
    yield (
        f"{first} of 17 dimensions",
        with_input(node, first, node.inputs[first].reshape(*[1] * 14, *node.inputs[first].shape)),
    )


def retyped(node: Node) -> Iterator[tuple[str, Node]]:
    for name, value in node.inputs.items():
        for dtype in TYPES:
            yield f"{name} of {dtype}", with_input(node, name, value.astype(dtype))


def renumbered(node: Node) -> Iterator[tuple[str, Node]]:
    """Attributes and ids that are out of range, missing, or of another type."""
    for name in node.op.attributes:
        for number in NUMBERS:
            yield f"{name} = {number}", replace(node, attributes={name: number})
        for value in (1.5, "many", [1, 2]):
            yield f"{name} = {value!r}", replace(node, attributes={name: value})
        yield f"no {name}", replace(node, attributes={})
    yield "an attribute of nobody", replace(node, attributes={**node.attributes, "depth": 3})
    if node.op.is_lookup:
        for number in NUMBERS:
            yield f"id {number}", with_input(node, "input_ids", np.array([0, number]))


def rewired(node: Node) -> Iterator[tuple[str, Node]]:
    names = list(node.inputs)
    yield "an input less", replace(node, names=tuple(names[:-1]))
    yield "an input more", replace(node, names=(*names, names[-1]))
    yield "no inputs", replace(node, names=("",) * len(names))
    yield "inputs in another order", replace(node, names=tuple(names[::-1]))
    for place, name in enumerate(names):
        yield f"no {name}", replace(node, names=(*names[:place], "", *names[place + 1 :]))


def wrongly_declared(node: Node) -> Iterator[tuple[str, Node]]:
    """The graph says another shape than the values have."""
    for name, value in node.inputs.items():
        if name not in node.initializers:
            for shape in ([1] * value.ndim, [2**40] * value.ndim, ["a"] * (value.ndim + 1), None):
                yield f"{name} declared as {shape}", replace(node, declared={name: shape})


def samples() -> Iterator[tuple[str, Node]]:
    """Graphs that once ended the process."""
    op, ids = OPS["Int4Gather"], np.zeros(1, np.int64)
    shapes = {"packed": (33, 0), "multiplier": (33, 0)}
    empty = {name: np.zeros(shape, np.uint8) for name, shape in shapes.items()}
    for columns in (8, 4096, 200_000):
        node = Node(
            op,
            {"input_ids": ids, **empty, "scale": np.ones(33, np.float32)},
            {"columns": columns},
            frozenset(empty),
        )
        yield f"an empty table of {columns} columns", node
    weights = {
        "packed": np.zeros((2, 16), np.uint8),
        "multiplier": np.zeros((2, 0), np.uint8),
        "scale": np.ones(2, np.float32),
    }
    for name, first in (
        ("Int4Gather", {"input_ids": ids}),
        ("Int4MatMul", {"x": np.ones((1, 32), np.float32)}),
    ):
        attributes = {"columns": 200_000} if name == "Int4Gather" else {}
        yield "an empty multiplier", Node(OPS[name], {**first, **weights}, attributes, frozenset(weights))
    yield "absurd columns", replace(right_node(op, is_constant=False), attributes={"columns": 2**63 - 1})


def table() -> Iterator[tuple[str, Node]]:
    for op in OPS.values():
        for is_constant in (True, False):
            node = right_node(op, is_constant)
            yield "right", node
            for changes in (reshaped, retyped, renumbered, rewired, wrongly_declared):
                yield from changes(node)
    yield from samples()


def mutants(count: int, seed: int) -> Iterator[tuple[str, Node]]:
    """Two or three changes of the table at once."""
    rng = np.random.default_rng(seed)
    ops = list(OPS.values())
    for number in range(count):
        node = right_node(ops[number % len(ops)], bool(rng.integers(2)), number)
        labels = []
        for _ in range(rng.integers(2, 4)):
            kinds = (reshaped, retyped, renumbered)
            changes = list(kinds[rng.integers(len(kinds))](node))
            label, node = changes[rng.integers(len(changes))]
            labels.append(label)
        if sum(value.size for value in node.inputs.values()) < 1e6:
            yield ", ".join(labels), node


def outcome(node: Node, library: str) -> dict[str, Any]:
    """`refused` and the sentence, `right`, or `wrong`: accepted with another result than the table's, or with any."""
    expected = node.expected()
    try:
        y = node.run(library)
    except Exception as error:  # of pybind, without a common base
        return {"outcome": "refused", "expected": expected is None, "sentence": str(error)}
    if expected is None:
        return {"outcome": "wrong", "expected": False, "sentence": f"returned {y.shape}"}
    same = y.shape == expected.shape and np.array_equal(y.view(np.int32), expected.view(np.int32))
    return {"outcome": "right" if same else "wrong", "expected": same, "sentence": ""}


def main(library: str, count: str, seed: str) -> None:
    for cases in (table(), mutants(int(count), int(seed))):
        for label, node in cases:
            kind = "initializers" if node.initializers else "inputs"
            print(json.dumps({"case": f"{node.op.name} ({kind}): {label}"}), end=" ", flush=True)
            print(json.dumps(outcome(node, library)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
