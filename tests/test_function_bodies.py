"""The ONNX function of every operator, run by stock ONNX Runtime, gives the bits of the table's numpy reference."""

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from microvlm.exporters.contract import OPSET
from microvlm.exporters.function_bodies import CHUNK_ROWS, function
from microvlm.formats.op_spec import OpSpec
from microvlm.formats.op_table import DOMAIN, DOMAIN_VERSION, OPS

LEVELS = [
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
]
MATMULS = [op for op in OPS.values() if op.inputs[0].name == "x"]
GATHERS = [op for op in OPS.values() if op.inputs[0].name == "input_ids"]
TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def operands(
    op: OpSpec, rows: int, columns: int, seed: int = 0, per_row: bool = True
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    if op.is_ternary:
        trits = rng.integers(-1, 2, (rows, columns)).astype(np.int8)
        scale = rng.uniform(0.01, 2, rows if per_row else 1).astype(np.float32)
        return dict(zip(op.weight_names, (*op.pack(trits), scale), strict=True))
    weight = rng.normal(size=(rows, columns)).astype(np.float32)
    return dict(zip(op.weight_names, op.quantize(weight), strict=True))


def attributes_of(op: OpSpec, rows: int, columns: int) -> dict[str, int]:
    return {name: {"rows": rows, "columns": columns}[name] for name in op.attributes}


def one_node_model(op: OpSpec, weights: dict, attributes: dict, rank: int, body=None) -> onnx.ModelProto:
    """A graph of one operator: every dimension of its input unknown, its weights initializers."""
    first = op.inputs[0]
    node = helper.make_node(
        op.name, [operand.name for operand in op.inputs], ["y"], domain=DOMAIN, **attributes
    )
    rank_out = rank if first.dtype == "float32" else rank + 1
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(first.name, TYPES[first.dtype], [None] * rank)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank_out)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[body or function(op)])


def run(model: onnx.ModelProto, value: np.ndarray, level=LEVELS[-1]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: value})[0]


def assert_same_bits(
    op: OpSpec, value: np.ndarray, weights: dict, attributes: dict, level=LEVELS[-1]
) -> None:
    expected = op.reference(value, *weights.values(), **attributes)
    actual = run(one_node_model(op, weights, attributes, value.ndim), value, level)
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_every_body_is_its_reference_at_every_optimisation_level(op, level):
    rows, columns = 37, 45
    weights, attributes = operands(op, rows, columns), attributes_of(op, rows, columns)
    rng = np.random.default_rng(1)
    activations = rng.normal(size=(2, 3, columns)).astype(np.float32)
    value = rng.integers(0, rows, (2, 3)) if op in GATHERS else activations
    assert_same_bits(op, value, weights, attributes, level)


@pytest.mark.parametrize("op", MATMULS, ids=lambda op: op.name)
def test_products_hold_for_any_size_and_any_batch(op):
    sizes = itertools.product((1, 2, 5, 9, 64), (1, 31, 32, 33, 200))
    for index, (rows, columns) in enumerate(sizes):
        weights, attributes = operands(op, rows, columns, seed=index), attributes_of(op, rows, columns)
        batch = 1 + index * 32 // 24
        x = np.random.default_rng(index).normal(size=(batch, columns)).astype(np.float32)
        assert_same_bits(op, x, weights, attributes)


@pytest.mark.parametrize("op", [op for op in MATMULS if op.is_ternary], ids=lambda op: op.name)
def test_one_scale_a_tensor_broadcasts(op):
    weights = operands(op, 11, 40, per_row=False)
    assert_same_bits(
        op, np.random.default_rng(2).normal(size=(4, 40)).astype(np.float32), weights, {"rows": 11}
    )


@pytest.mark.parametrize("op", MATMULS, ids=lambda op: op.name)
def test_leading_dimensions_of_any_rank_come_back(op):
    weights, attributes = operands(op, 6, 8), attributes_of(op, 6, 8)
    for lead in ((3,), (1, 1), (2, 1, 3), (1, 2, 2, 2)):
        x = np.random.default_rng(3).normal(size=(*lead, 8)).astype(np.float32)
        assert_same_bits(op, x, weights, attributes)


def extreme_inputs(columns: int) -> np.ndarray:
    rng = np.random.default_rng(4)
    tiny = np.float32(1e-30)
    return np.stack(
        [
            np.zeros(columns),
            np.full(columns, 1e-7),
            np.full(columns, 1e35),
            np.full(columns, -1e35),
            np.where(np.arange(columns) % 2, 127, -127),
            np.arange(columns) % 128 - 0.5 * (np.arange(columns) % 2),
            rng.normal(size=columns) * tiny,
            np.r_[1e30, rng.normal(size=columns - 1)],
        ]
    ).astype(np.float32)


@pytest.mark.parametrize("op", MATMULS, ids=lambda op: op.name)
def test_extreme_activations_give_the_same_bits(op):
    weights, attributes = operands(op, 21, 256), attributes_of(op, 21, 256)
    assert_same_bits(op, extreme_inputs(256), weights, attributes)


@pytest.mark.parametrize("op", MATMULS, ids=lambda op: op.name)
def test_the_largest_sums_are_exact(op):
    """Every weight and int8 activation is at its limit: 16 bit pair sums saturate, 24 bit mantissas round."""
    rows, columns = 5, 4096
    weights, attributes = operands(op, rows, columns), attributes_of(op, rows, columns)
    if op.is_ternary:
        trits = np.ones((rows, columns), np.int8)
        trits[1] = -1
        (weights["packed"],) = op.pack(trits)
    else:
        weights["packed"][:] = 255
        if "multiplier" in weights:
            weights["multiplier"][:] = 255
    x = np.stack([np.full(columns, 5.0), np.full(columns, -5.0)]).astype(np.float32)
    assert_same_bits(op, x, weights, attributes)


@pytest.mark.parametrize(
    "rows", [CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS, 2 * CHUNK_ROWS + 700]
)
def test_int4_rows_are_in_order_around_chunk_borders(rows):
    op = OPS["Int4MatMul"]
    x = np.random.default_rng(5).normal(size=(3, 33)).astype(np.float32)
    assert_same_bits(op, x, operands(op, rows, 33), {})


@pytest.mark.parametrize("op", GATHERS, ids=lambda op: op.name)
def test_gathers_take_ids_of_any_rank_and_repeats(op):
    weights, attributes = operands(op, 50, 40), attributes_of(op, 50, 40)
    for ids in (np.array([49, 0, 0, 7]), np.array([[3], [49]]), np.array([[[1, 2]]])):
        assert_same_bits(op, ids, weights, attributes)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_nothing_unpacked_is_kept_by_the_loaded_session(op, tmp_path):
    """After all its optimisations ONNX Runtime holds the packed bytes, not constants folded from them."""
    rows, columns = 640, 512
    weights, attributes = operands(op, rows, columns), attributes_of(op, rows, columns)
    model = one_node_model(op, weights, attributes, 2)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    initializers = onnx.load(tmp_path / "optimised.onnx").graph.initializer
    kept_bytes = sum(numpy_helper.to_array(tensor).nbytes for tensor in initializers)
    assert kept_bytes <= sum(value.nbytes for value in weights.values()) + 512


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_onnxruntime_runs_the_body_that_is_in_the_file(op):
    """A body that negates its result negates the node: no other implementation stands behind the name."""
    body = function(op)
    last = body.node[-1]
    last.output[0] = "positive"
    body.node.append(helper.make_node("Neg", ["positive"], ["y"]))
    weights, attributes = operands(op, 9, 32), attributes_of(op, 9, 32)
    value = (
        np.array([[0, 8]])
        if op in GATHERS
        else np.random.default_rng(6).normal(size=(1, 32)).astype(np.float32)
    )
    negated = run(one_node_model(op, weights, attributes, value.ndim, body), value)
    np.testing.assert_array_equal(negated, -op.reference(value, *weights.values(), **attributes))


def test_every_operator_of_the_table_has_a_valid_body():
    for op in OPS.values():
        onnx.checker.check_model(one_node_model(op, operands(op, 8, 32), attributes_of(op, 8, 32), 2))
