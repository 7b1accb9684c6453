"""A graph of a bundle, opened up at every quantised layer: codes can be recorded or given, integer sums come out.

The operator itself stays in place and does the arithmetic, function body or native kernel alike. A node
y = Op(x, W, scale) becomes, with the operator called on integers so that its result is its integer sums:

    own   = clip(round(x * (127 / peak)), -128, 127)          the layer's codes, by standard operators
    used  = replay ? given codes : own
    sums  = Op(used, W, ones)                                 a row of integers whose peak is 127 has a step of 1
    y     = peak > 1e-5 ? sums * ((peak / 127) * scale) : direct
    direct = Op(x, W, scale)                                  what the graph computes when nobody looks

`x`, `sums`, `y` and `direct` become outputs. A row whose peak is at the floor has no code of 127, so its sums can't be
asked for this way and it keeps `direct`. Trits that are stored dense, at 16 or 32 bits, have no operator but standard
nodes, and their MatMul is the sum. Knows one graph; needs onnx.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from microvlm.formats.op_table import DOMAIN, OPS

PREFIX = "microvlm.probe"
REPLAY = f"{PREFIX}.replay"
"""Input bool []: whether the given codes overrule the layers' own."""
MATMULS = frozenset(name for name, op in OPS.items() if op.inputs[0].name == "x")
_OUTPUTS = ("sums", "scaled", "direct")


@dataclass(frozen=True)
class Layer:
    """Names of one layer's tensors in a probed graph."""

    name: str
    """As in the model: the packed weight's name without `.packed`."""
    x: str
    codes: str
    """Input int8, shaped like `x`, or [1] when recording."""
    sums: str
    scaled: str = ""
    direct: str = ""
    """Empty, as `scaled`, for a dense layer: no operator to hold against its sums."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(name for name in (self.x, self.sums, self.scaled, self.direct) if name)


@dataclass(frozen=True)
class ProbedGraph:
    model: onnx.ModelProto
    layers: tuple[Layer, ...]
    outputs: tuple[str, ...]
    """The graph's own outputs first, then the layers'."""
    folder: Path
    """Where the external data is."""

    def open(self, options: Any) -> Any:
        """An InferenceSession; weights stay in the bundle's own files. `options`: SessionOptions."""
        import onnxruntime

        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.folder.resolve())
        )
        return onnxruntime.InferenceSession(
            self.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def is_quantised_matmul(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type in MATMULS


def probe(path: Path) -> ProbedGraph:
    """The graph in the file `path` with every quantised layer opened up."""
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    dense = _dense_layers(graph)
    layers, nodes = [], list(_constants())
    for node in graph.node:
        if is_quantised_matmul(node):
            layers.append(_layer(node))
            nodes += _opened(node, layers[-1])
        elif node.output[0] in dense:
            layers.append(dense[node.output[0]])
            nodes += _opened_dense(node, layers[-1])
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    own_outputs = [value.name for value in graph.output]
    known = {*own_outputs, *(value.name for value in graph.input)}
    graph.input.append(helper.make_tensor_value_info(REPLAY, TensorProto.BOOL, []))
    extra: list[str] = []
    for layer in layers:
        graph.input.append(helper.make_tensor_value_info(layer.codes, TensorProto.INT8, None))
        extra += layer.outputs
    extra = [name for name in dict.fromkeys(extra) if name not in known]
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in extra)
    return ProbedGraph(model, tuple(layers), (*own_outputs, *extra), path.parent)


def _layer(node: onnx.NodeProto) -> Layer:
    name = node.input[1].removesuffix(".packed")
    return Layer(name, node.input[0], *(f"{PREFIX}.{name}.{part}" for part in ("codes", *_OUTPUTS)))


def _dense_layers(graph: onnx.GraphProto) -> dict[str, Layer]:
    """Layers of dense trits by the output of their MatMul: weights NAME.weight that have a NAME.scale, behind
    x -> Mul -> Round -> Clip -> MatMul, or Gemm for two dimensions."""
    makers = {node.output[0]: node for node in graph.node if node.output}
    names = {tensor.name for tensor in graph.initializer}
    layers = {}
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = node.input[1]
        while weight in makers and makers[weight].op_type in ("Cast", "Transpose"):
            weight = makers[weight].input[0]
        name = weight.removesuffix(".weight")
        clip = makers.get(node.input[0])
        if name == weight or f"{name}.scale" not in names or clip is None or clip.op_type != "Clip":
            continue
        x = makers[makers[clip.input[0]].input[0]].input[0]
        layers[node.output[0]] = Layer(name, x, f"{PREFIX}.{name}.codes", node.output[0])
    return layers


def _opened_dense(node: onnx.NodeProto, layer: Layer) -> list[onnx.NodeProto]:
    given, used = f"{PREFIX}.{layer.name}.given", f"{PREFIX}.{layer.name}.used"
    product = onnx.NodeProto()
    product.CopyFrom(node)
    product.input[0] = used
    return [
        helper.make_node("Cast", [layer.codes], [given], to=TensorProto.FLOAT),
        helper.make_node("Where", [REPLAY, given, node.input[0]], [used]),
        product,
    ]


def _constants() -> list[onnx.NodeProto]:
    def scalar(name: str, value: float) -> onnx.NodeProto:
        tensor = helper.make_tensor(name, TensorProto.FLOAT, [], [value])
        return helper.make_node("Constant", [], [f"{PREFIX}.{name}"], value=tensor)

    axes = helper.make_tensor("last", TensorProto.INT64, [1], [-1])
    return [
        scalar("limit", 127.0),
        scalar("lowest", -128.0),
        scalar("floor", 1e-5),
        helper.make_node("Constant", [], [f"{PREFIX}.last"], value=axes),
    ]


def _opened(node: onnx.NodeProto, layer: Layer) -> list[onnx.NodeProto]:
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
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    return [
        make("Abs", [x], own("magnitude")),
        make("ReduceMax", [own("magnitude"), shared("last")], own("raw_peak"), keepdims=1),
        make("Max", [own("raw_peak"), shared("floor")], own("peak")),
        make("Div", [shared("limit"), own("peak")], own("inverse_step")),
        make("Mul", [x, own("inverse_step")], own("scaled_x")),
        make("Round", [own("scaled_x")], own("rounded")),
        make("Clip", [own("rounded"), shared("lowest"), shared("limit")], own("own_codes")),
        make("Cast", [layer.codes], own("given"), to=TensorProto.FLOAT),
        make("Where", [REPLAY, own("given"), own("own_codes")], own("used")),
        make("Shape", [scale], own("scale_shape")),
        make("ConstantOfShape", [own("scale_shape")], own("ones"), value=one),
        summing,
        make("Div", [own("peak"), shared("limit")], own("step")),
        make("Mul", [own("step"), scale], own("factor")),
        make("Mul", [layer.sums, own("factor")], layer.scaled),
        direct,
        make("Greater", [own("raw_peak"), shared("floor")], own("above_floor")),
        make("Where", [own("above_floor"), layer.scaled, layer.direct], node.output[0]),
    ]
