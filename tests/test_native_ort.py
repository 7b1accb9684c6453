"""The native library inside ONNX Runtime: kernels replace the function bodies in the file and give the same bits."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from test_function_bodies import GATHERS, MATMULS, attributes_of, one_node_model, operands

from microvlm.backends import native
from microvlm.exporters.function_bodies import function
from microvlm.formats.op_table import DOMAIN, OPS

every_op = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
products = pytest.mark.parametrize("op", MATMULS, ids=lambda op: op.name)


def negated_body(op) -> onnx.FunctionProto:
    """A function body with the sign of its result flipped: a test sees when it ran."""
    body = function(op)
    body.node[-1].output[0] = "positive"
    body.node.append(helper.make_node("Neg", ["positive"], ["y"]))
    return body


def open_native(model: onnx.ModelProto, library, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(model: onnx.ModelProto, value: np.ndarray, library, threads: int = 1) -> np.ndarray:
    session = open_native(model, library, threads)
    return session.run(None, {session.get_inputs()[0].name: value})[0]


def assert_native_bits(op, value, weights, attributes, library, threads: int = 1) -> None:
    expected = op.reference(value, *weights.values(), **attributes)
    y = run(one_node_model(op, weights, attributes, value.ndim, negated_body(op)), value, library, threads)
    assert y.shape == expected.shape
    np.testing.assert_array_equal(y.view(np.int32), expected.view(np.int32))


@every_op
def test_the_kernel_runs_in_place_of_the_function_in_the_file(op, native_library):
    rows, columns = 37, 45
    weights, attributes = operands(op, rows, columns), attributes_of(op, rows, columns)
    rng = np.random.default_rng(0)
    for lead in ((3,), (1, 1), (2, 1, 3), (1, 2, 2, 2)):
        activations = rng.normal(size=(*lead, columns)).astype(np.float32)
        value = rng.integers(-rows, rows, lead) if op in GATHERS else activations
        assert_native_bits(op, value, weights, attributes, native_library)


@products
@pytest.mark.parametrize("threads", range(1, 9))
def test_any_number_of_threads_gives_the_same_bits(op, threads, native_library):
    rows, columns = 1537, 1100
    weights, attributes = operands(op, rows, columns), attributes_of(op, rows, columns)
    for batch in (1, 5, 19):
        x = np.random.default_rng(batch).normal(size=(batch, columns)).astype(np.float32)
        assert_native_bits(op, x, weights, attributes, native_library, threads)


@products
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_kernel_and_function_body_agree_on_tokens_that_are_not_finite(op, bad, native_library):
    rows, columns = 21, 70
    weights, attributes = operands(op, rows, columns), attributes_of(op, rows, columns)
    x = np.random.default_rng(1).normal(size=(5, columns)).astype(np.float32)
    x[1, 0] = x[3, 69] = bad
    expected = op.reference(x, *weights.values(), **attributes)
    assert np.isnan(expected).all(1).tolist() == [False, True, False, True, False]
    assert not np.isnan(expected[[0, 2, 4]]).any()
    model = one_node_model(op, weights, attributes, 2)
    body = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(body.run(None, {"x": x})[0], expected)
    np.testing.assert_array_equal(run(model, x, native_library), expected)


@products
def test_no_tokens_are_no_outputs(op, native_library):
    weights, attributes = operands(op, 8, 32), attributes_of(op, 8, 32)
    model = one_node_model(op, weights, attributes, 2)
    assert run(model, np.zeros((0, 32), np.float32), native_library).shape == (0, 8)


@pytest.mark.parametrize("op", GATHERS, ids=lambda op: op.name)
@pytest.mark.parametrize("outside", [50, -51, 2**40])
def test_an_id_outside_the_table_is_an_error(op, outside, native_library):
    model = one_node_model(op, operands(op, 50, 40), attributes_of(op, 50, 40), 1)
    with pytest.raises(Exception, match="an id is outside the table"):
        run(model, np.array([0, outside]), native_library)


@products
def test_operands_that_do_not_fit_are_an_error(op, native_library):
    weights, attributes = operands(op, 8, 64), attributes_of(op, 8, 64)
    model = one_node_model(op, weights, attributes, 2)
    with pytest.raises(Exception, match="x and packed differ in columns"):
        run(model, np.zeros((1, 96), np.float32), native_library)
    weights["scale"] = weights["scale"][:3]
    model = one_node_model(op, weights, attributes, 2)
    with pytest.raises(Exception, match="neither one value nor one a row"):
        run(model, np.zeros((1, 64), np.float32), native_library)


@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.inputs[2].name == "multiplier"], ids=lambda op: op.name
)
def test_an_empty_multiplier_is_an_error_and_no_absent_one(op, native_library):
    """ONNX Runtime gives a null pointer for a tensor without elements: it once switched the checks off."""
    weights = {**operands(op, 2, 32), "multiplier": np.zeros((2, 0), np.uint8)}
    value = np.zeros(1, np.int64) if op in GATHERS else np.ones((1, 32), np.float32)
    attributes = {"columns": 200_000} if op in GATHERS else {}
    with pytest.raises(Exception, match=r"do not fit each other|multiplier does not fit packed"):
        run(one_node_model(op, weights, attributes, value.ndim), value, native_library)


@pytest.mark.parametrize("columns", [-1, 0, 8, 31, 65, 2**63 - 1, -(2**63)])
def test_a_gather_refuses_columns_that_its_table_does_not_have(columns, native_library):
    op = OPS["Int4Gather"]
    weights = {"packed": np.zeros((33, 0), np.uint8), "multiplier": np.zeros((33, 0), np.uint8)}
    empty = {**weights, "scale": np.ones(33, np.float32)}
    for weights in (empty, operands(op, 4, 64)):
        if columns in (0, 64) and weights is empty:
            continue
        with pytest.raises(Exception, match=r"do not fit each other|[Dd]imension|[Ss]hape"):
            run(one_node_model(op, weights, {"columns": columns}, 1), np.zeros(3, np.int64), native_library)


def test_shapes_go_through_a_chain_of_nodes_and_unknown_ones_stay_unknown(native_library):
    op = OPS["TernaryMatMul2x4"]
    first, second = operands(op, 24, 40), operands(op, 9, 24)
    nodes = [
        helper.make_node(op.name, ["x", "w1", "s1"], ["h"], domain=DOMAIN, rows=24),
        helper.make_node("Reshape", ["h", "shape"], ["r"]),
        helper.make_node(op.name, ["r", "w2", "s2"], ["y"], domain=DOMAIN, rows=9),
    ]
    tensors = zip(("w1", "s1", "w2", "s2"), (*first.values(), *second.values()), strict=True)
    graph = helper.make_graph(
        nodes,
        "chain",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", 40]),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [None]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in tensors],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function(op)])
    x = np.random.default_rng(2).normal(size=(2, 3, 40)).astype(np.float32)
    session = open_native(model, native_library)
    y = session.run(None, {"x": x, "shape": np.array([6, 24])})[0]
    hidden = op.reference(x, *first.values(), rows=24).reshape(6, 24)
    np.testing.assert_array_equal(y, op.reference(hidden, *second.values(), rows=9))


@every_op
def test_weights_at_any_address_give_the_same_bits(op, native_library, tmp_path):
    """External data at odd offsets of its file is mapped at odd addresses, floats too."""
    rows, columns = 30, 50
    weights, attributes = operands(op, rows, columns), attributes_of(op, rows, columns)
    model = one_node_model(op, weights, attributes, 2)
    data = b"!"
    for tensor in model.graph.initializer:
        data += b"!" * (len(data) % 2 == 0)
        location = {"location": "weights.data", "offset": len(data), "length": len(tensor.raw_data)}
        data += tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in location.items():
            tensor.external_data.add(key=key, value=str(value))
    (tmp_path / "weights.data").write_bytes(data)
    onnx.save(model, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(native_library))
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(3)
    value = rng.integers(0, rows, (2, 5)) if op in GATHERS else rng.normal(size=(2, columns))
    value = value.astype(np.int64 if op in GATHERS else np.float32)
    expected = op.reference(value, *weights.values(), **attributes)
    np.testing.assert_array_equal(session.run(None, {op.inputs[0].name: value})[0], expected)


FORCED = """
import sys
import numpy as np
import onnxruntime
from microvlm.backends import native
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(str(native.library_path()))
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
x = np.random.default_rng(4).normal(size=(7, 300)).astype(np.float32)
np.save(sys.argv[2], session.run(None, {"x": x})[0])
print(native.active_variant())
"""


@products
def test_a_variant_forced_by_the_environment_runs_and_gives_the_same_bits(
    op, native_library, tmp_path, monkeypatch
):
    weights, attributes = operands(op, 100, 300), attributes_of(op, 100, 300)
    onnx.save(one_node_model(op, weights, attributes, 2, negated_body(op)), tmp_path / "model.onnx")
    x = np.random.default_rng(4).normal(size=(7, 300)).astype(np.float32)
    expected = op.reference(x, *weights.values(), **attributes)
    for variant in native.variants():
        monkeypatch.setenv("MICROVLM_KERNELS", variant)
        command = [sys.executable, "-c", FORCED, str(tmp_path / "model.onnx"), str(tmp_path / "y.npy")]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert output.strip() == variant
        np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected)
