"""Opens an ONNX graph at every quantised layer: int8 activations can be recorded or replaced, integer sums come out.

The operator itself stays in place and does the arithmetic, function body or native kernel alike. A node
y = Op(x, W, scale) becomes, with the operator called on integers so that its result is its integer sums:

    own    = clip(round(x * (127 / absmax)), -128, 127)       the layer's activations, by standard operators
    used   = replay ? replacement : own
    sums   = Op(used, W, ones)                                a row of integers whose absmax is 127 has a scale of 1
    y      = absmax > 1e-5 ? sums * ((absmax / 127) * scale) : direct
    direct = Op(x, W, scale)                                  the operator of the graph as it was exported

A fused layer is expanded first, as the file's own function says, so that its products are such nodes; a copy of it
stays as it was exported, for its outputs to be compared with.

`x`, `sums`, `y` and `direct` become outputs. A row whose absmax is at the floor has no activation of 127, so its sums
cannot be had this way and it keeps `direct`. Trits that are stored dense, at 16 or 32 bits, have no operator but
standard nodes, and their MatMul is the sum. Knows one graph; needs onnx.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.inliner import inline_selected_functions

from microvlm.exporters.replay.model_session import open_session
from microvlm.formats.layer_table import LAYERS
from microvlm.formats.op_spec import ABSMAX_FLOOR, Q8_MAX, Q8_MIN, quantize_activations
from microvlm.formats.op_table import DOMAIN, OPS
from microvlm.runtime import LayerCall, LayerListener

PREFIX = "microvlm.probe"
REPLAY = f"{PREFIX}.replay"
"""Input bool []: whether the replacements overrule the layers' own activations."""

_DIRECT = f"{PREFIX}.direct."

RunModel = Callable[[dict[str, Any], Sequence[str]], dict[str, Any]]
"""Runs a model: values by input name, names of outputs -> values by output name."""


@dataclass(frozen=True)
class ProbedLayer:
    """Names of one layer's tensors in a probed graph."""

    name: str
    """Layer name as in the model: the packed weight's name without `.packed`."""
    x: str
    replacement: str
    """Input int8, shaped like `x`, or [1] when recording."""
    sums: str
    scaled_sums: str = ""
    direct: str = ""
    """Empty, as `scaled_sums`, for a dense layer: it has no operator to hold against its sums."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(name for name in (self.x, self.sums, self.scaled_sums, self.direct) if name)


@dataclass(frozen=True)
class FusedNode:
    """Names of the outputs of a fused layer in a probed graph."""

    direct: tuple[str, ...]
    """Of the node as it was exported."""
    opened: tuple[str, ...]
    """Of its opened layers."""


@dataclass(frozen=True)
class ProbedGraph:
    """A graph with its layers opened."""

    model: onnx.ModelProto
    layers: tuple[ProbedLayer, ...]
    fused: tuple[FusedNode, ...]
    outputs: tuple[str, ...]
    """The graph's own outputs first, then the layers'."""
    folder: Path
    """Holds the external data."""

    def open(self, options: Any) -> Any:
        """An InferenceSession; weights stay in the bundle's own files. `options`: SessionOptions, which it changes."""
        return open_session(self.model.SerializeToString(), self.folder, options)

    def run(self, run: RunModel, feeds: dict[str, Any], listener: LayerListener) -> dict[str, Any]:
        """Run the model by `run` and pass every layer's call to `listener` -> every output by name.

        `feeds` are the original graph's inputs; values may be arrays or a backend's own with `numpy()`.
        """
        replacements = {layer.name: listener.replacement(layer.name) for layer in self.layers}
        replay = any(value is not None for value in replacements.values())
        nothing = np.zeros(1, np.int8)
        extra = {layer.replacement: replacements[layer.name] if replay else nothing for layer in self.layers}
        outputs = run({**feeds, **extra, REPLAY: np.asarray(replay)}, self.outputs)
        for layer in self.layers:
            arrays = {name: _array(outputs.get(name, feeds.get(name))) for name in layer.outputs}
            x = arrays[layer.x]
            activations_q8 = replacements[layer.name]
            if activations_q8 is None:
                activations_q8 = quantize_activations(x)[0]
            listener.observe(
                layer.name,
                LayerCall(
                    x,
                    activations_q8,
                    arrays[layer.sums],
                    arrays.get(layer.direct),
                    arrays.get(layer.scaled_sums),
                ),
            )
        for node in () if replay else self.fused:
            listener.observe_fused(
                node.opened[0],
                [_array(outputs[name]) for name in node.direct],
                [_array(outputs[name]) for name in node.opened],
            )
        return outputs


def is_quantized_matmul(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type in OPS and not OPS[node.op_type].is_lookup


def probe(path: Path) -> ProbedGraph:
    """Read the graph in the file `path` and open every quantised layer."""
    model, copies = expand_layers(onnx.load(str(path), load_external_data=False))
    graph = model.graph
    dense = _dense_layers(graph)
    layers, nodes = [], list(_constants())
    for node in graph.node:
        if is_quantized_matmul(node):
            layers.append(_layer(node))
            nodes += _open_operator(node, layers[-1])
        elif node.output[0] in dense:
            layers.append(dense[node.output[0]])
            nodes += _open_dense(node, layers[-1])
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    own_outputs = [value.name for value in graph.output]
    existing_names = {*own_outputs, *(value.name for value in graph.input)}
    graph.input.append(helper.make_tensor_value_info(REPLAY, TensorProto.BOOL, []))
    fused = [
        FusedNode(tuple(copy.output), tuple(name.removeprefix(_DIRECT) for name in copy.output))
        for copy in copies
    ]
    extra = [name for node in fused for name in (*node.direct, *node.opened)]
    for layer in layers:
        graph.input.append(helper.make_tensor_value_info(layer.replacement, TensorProto.INT8, None))
        extra += layer.outputs
    extra = [name for name in dict.fromkeys(extra) if name not in existing_names]
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in extra)
    return ProbedGraph(model, tuple(layers), tuple(fused), (*own_outputs, *extra), path.parent)


def expand_layers(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[onnx.NodeProto]]:
    """The model with its fused layers expanded, and copies of these, whose outputs have names of their own."""
    copies = []
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type in LAYERS:
            copies.append(onnx.NodeProto())
            copies[-1].CopyFrom(node)
            copies[-1].output[:] = [f"{_DIRECT}{name}" for name in node.output]
    if not copies:
        return model, []
    functions = [function for function in model.functions if function.name in LAYERS]
    expanded = inline_selected_functions(model, [(DOMAIN, function.name) for function in functions])
    expanded.functions.extend(functions)
    expanded.graph.node.extend(copies)
    return expanded, copies


def _layer(node: onnx.NodeProto) -> ProbedLayer:
    name = node.input[1].removesuffix(".packed")
    parts = ("replacement", "sums", "scaled_sums", "direct")
    return ProbedLayer(name, node.input[0], *(f"{PREFIX}.{name}.{part}" for part in parts))


def _dense_layers(graph: onnx.GraphProto) -> dict[str, ProbedLayer]:
    """Layers of dense trits by the output of their MatMul: weights NAME.weight that have a NAME.scale, behind
    x -> Mul -> Round -> Clip -> MatMul, or Gemm for two dimensions."""
    producers = {node.output[0]: node for node in graph.node if node.output}
    initializers = {tensor.name for tensor in graph.initializer}
    layers = {}
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = node.input[1]
        while weight in producers and producers[weight].op_type in ("Cast", "Transpose"):
            weight = producers[weight].input[0]
        name = weight.removesuffix(".weight")
        clip = producers.get(node.input[0])
        if name == weight or f"{name}.scale" not in initializers or clip is None or clip.op_type != "Clip":
            continue
        x = producers[producers[clip.input[0]].input[0]].input[0]
        layers[node.output[0]] = ProbedLayer(name, x, f"{PREFIX}.{name}.replacement", node.output[0])
    return layers


def _open_dense(node: onnx.NodeProto, layer: ProbedLayer) -> list[onnx.NodeProto]:
    wide, activations = f"{PREFIX}.{layer.name}.wide", f"{PREFIX}.{layer.name}.used"
    product = onnx.NodeProto()
    product.CopyFrom(node)
    product.input[0] = activations
    return [
        helper.make_node("Cast", [layer.replacement], [wide], to=TensorProto.FLOAT),
        helper.make_node("Where", [REPLAY, wide, node.input[0]], [activations]),
        product,
    ]


def _constants() -> list[onnx.NodeProto]:
    def scalar(name: str, value: float) -> onnx.NodeProto:
        tensor = helper.make_tensor(name, TensorProto.FLOAT, [], [value])
        return helper.make_node("Constant", [], [f"{PREFIX}.{name}"], value=tensor)

    axes = helper.make_tensor("last", TensorProto.INT64, [1], [-1])
    return [
        scalar("limit", float(Q8_MAX)),
        scalar("lowest", float(Q8_MIN)),
        scalar("floor", float(ABSMAX_FLOOR)),
        helper.make_node("Constant", [], [f"{PREFIX}.last"], value=axes),
    ]


def _open_operator(node: onnx.NodeProto, layer: ProbedLayer) -> list[onnx.NodeProto]:
    """The nodes that take the place of `node`; the last one makes its output."""

    def own(name: str) -> str:
        return f"{PREFIX}.{layer.name}.{name}"

    def shared(name: str) -> str:
        return f"{PREFIX}.{name}"

    def make(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [output], name=output, **attributes)

    x, scale, weights = node.input[0], node.input[-1], list(node.input[1:-1])
    direct, summing = onnx.NodeProto(), onnx.NodeProto()
    direct.CopyFrom(node)
    direct.name, direct.output[0] = layer.direct, layer.direct
    summing.CopyFrom(node)
    summing.name, summing.output[0] = layer.sums, layer.sums
    del summing.input[:]
    summing.input.extend([own("used"), *weights, own("ones")])
    unit_value = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    return [
        make("Abs", [x], own("magnitude")),
        make("ReduceMax", [own("magnitude"), shared("last")], own("raw_absmax"), keepdims=1),
        make("Max", [own("raw_absmax"), shared("floor")], own("absmax")),
        make("Div", [shared("limit"), own("absmax")], own("inverse_scale")),
        make("Mul", [x, own("inverse_scale")], own("unrounded")),
        make("Round", [own("unrounded")], own("rounded")),
        make("Clip", [own("rounded"), shared("lowest"), shared("limit")], own("own_activations")),
        make("Cast", [layer.replacement], own("wide"), to=TensorProto.FLOAT),
        make("Where", [REPLAY, own("wide"), own("own_activations")], own("used")),
        make("Shape", [scale], own("scale_shape")),
        make("ConstantOfShape", [own("scale_shape")], own("ones"), value=unit_value),
        summing,
        make("Div", [own("absmax"), shared("limit")], own("activation_scale")),
        make("Mul", [own("activation_scale"), scale], own("factor")),
        make("Mul", [layer.sums, own("factor")], layer.scaled_sums),
        direct,
        make("Greater", [own("raw_absmax"), shared("floor")], own("above_floor")),
        make("Where", [own("above_floor"), layer.scaled_sums, layer.direct], node.output[0]),
    ]


def _array(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.numpy()
