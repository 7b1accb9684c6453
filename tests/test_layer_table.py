"""Fused layers: numpy reference, function body, native kernel and an older library give the same bits."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from microvlm.backends import native
from microvlm.exporters.contract import OPSET
from microvlm.exporters.function_bodies import functions_for
from microvlm.formats.layer_table import LAYERS, MASK, LayerSpec, decoder_mask, exponential, normalize
from microvlm.formats.op_table import DOMAIN, DOMAIN_VERSION

EPSILON = 1e-6
HALF = 8
ATTENTION_SIZES = {"norm": 96, "query": (64, 96), "key": (32, 96), "value": (32, 96)}
FEED_FORWARD_SIZES = {
    "mixed_norm": 64, "out": (96, 64), "norm": 96, "gate": (160, 96), "up": (160, 96), "inner_norm": 160,
    "down": (96, 160),
}  # fmt: skip
ROWS = {"query_rows": 64, "key_rows": 32, "rows": 96, "inner_rows": 160}
LEVELS = [
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
]
ONE_NUMBER_A_LAYER = [pytest.param(layer, id=name) for name, layer in LAYERS.items()]


def activations(layer: LayerSpec, lead: tuple[int, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    if layer.outputs == ("y",):
        return {
            "mixed": 3 * rng.standard_normal((*lead, 64)).astype(np.float32),
            "x": rng.standard_normal((*lead, 96)).astype(np.float32),
        }
    angles = rng.uniform(0, 6, (*lead, HALF))
    x = rng.standard_normal((*lead, 96)).astype(np.float32)
    return {"x": x, "cosine": np.cos(angles, dtype=np.float32), "sine": np.sin(angles, dtype=np.float32)}


def weights(
    layer: LayerSpec, rng: np.random.Generator, optional: bool = True, one_scale: bool = False
) -> dict[str, np.ndarray]:
    """Random weights; without `optional`, biases and inner norms are empty."""
    sizes = FEED_FORWARD_SIZES if layer.outputs == ("y",) else ATTENTION_SIZES
    result = {}
    for operand in layer.weights:
        matrix, _, part = operand.name.rpartition("_")
        if part == "packed":
            result[operand.name] = layer.product.pack(rng.integers(-1, 2, sizes[matrix]).astype(np.int8))[0]
        elif part == "scale":
            count = 1 if one_scale else sizes[matrix][0]
            result[operand.name] = rng.uniform(0.001, 0.03, count).astype(np.float32)
        elif operand.shape.startswith("[0]") and not optional:
            result[operand.name] = np.zeros(0, np.float32)
        else:
            length = sizes[matrix][0] if part == "bias" else sizes[operand.name]
            result[operand.name] = (1 + 0.1 * rng.standard_normal(length)).astype(np.float32)
    return result


def one_layer(layer: LayerSpec, operands: dict[str, np.ndarray], **changes: int) -> onnx.ModelProto:
    """A graph of one layer: its weights are initializers, or constants where they are empty."""
    attributes = {**{name: ROWS[name] for name in layer.attributes}, "epsilon": EPSILON, **changes}
    inputs = [operand.name for operand in layer.inputs]
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
        for name, value in operands.items()
        if not value.size
    ]
    nodes.append(helper.make_node(layer.name, inputs, list(layer.outputs), domain=DOMAIN, **attributes))
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info(each.name, TensorProto.FLOAT, None) for each in layer.activations],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in layer.outputs],
        [numpy_helper.from_array(value, name) for name, value in operands.items() if value.size],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions_for(nodes))


def run(
    model: onnx.ModelProto, feeds: dict, library: Path | None = None, threads: int = 1, level=LEVELS[-1]
) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.graph_optimization_level = threads, level
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds)


def library() -> Path:
    path = native.library_path()
    assert path is not None, native.absence()
    return path


def reference(layer: LayerSpec, feeds: dict, operands: dict) -> tuple[np.ndarray, ...]:
    rows = {name: ROWS[name] for name in layer.attributes}
    return layer.reference(*feeds.values(), *operands.values(), epsilon=EPSILON, **rows)


def assert_equal(outputs, expected) -> None:
    for output, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(output, wanted)


@pytest.mark.parametrize("layer", ONE_NUMBER_A_LAYER)
@pytest.mark.parametrize("optional", [True, False])
def test_a_body_gives_the_reference_s_bits_at_every_optimisation_level(
    layer: LayerSpec, optional: bool
) -> None:
    rng = np.random.default_rng(0)
    for lead, level in itertools.product([(1, 1), (2, 3)], LEVELS):
        feeds, operands = activations(layer, lead, rng), weights(layer, rng, optional)
        outputs = run(one_layer(layer, operands), feeds, level=level)
        assert_equal(outputs, reference(layer, feeds, operands))


@pytest.mark.native
@pytest.mark.parametrize("variant", native.variants() if native.library_path() else [])
@pytest.mark.parametrize("layer", ONE_NUMBER_A_LAYER)
def test_every_variant_gives_the_reference_s_bits(layer: LayerSpec, variant: str, monkeypatch) -> None:
    monkeypatch.setenv("MICROVLM_KERNELS", variant)
    rng = np.random.default_rng(1)
    for (lead, optional), threads in itertools.product(
        [((1, 1), True), ((2, 3), False), ((1, 90), True), ((3, 0), True)], [1, 3]
    ):
        feeds, operands = activations(layer, lead, rng), weights(layer, rng, optional, one_scale=threads == 1)
        outputs = run(one_layer(layer, operands), feeds, library(), threads)
        assert_equal(outputs, reference(layer, feeds, operands))


@pytest.mark.native
@pytest.mark.parametrize("layer", ONE_NUMBER_A_LAYER)
def test_tokens_that_are_not_finite_are_not_finite_alone(layer: LayerSpec) -> None:
    rng = np.random.default_rng(2)
    feeds, operands = activations(layer, (1, 3), rng), weights(layer, rng)
    expected = run(one_layer(layer, operands), feeds, library())
    first = next(iter(feeds.values()))
    for bad in (np.nan, np.inf):
        first[0, 1, 5] = bad
        for outputs in (
            run(one_layer(layer, operands), feeds, library()),
            run(one_layer(layer, operands), feeds),
        ):
            for output, finite in zip(outputs, expected, strict=True):
                assert np.isnan(output[:, 1]).all()
                np.testing.assert_array_equal(output[:, [0, 2]], finite[:, [0, 2]])


@pytest.mark.native
@pytest.mark.parametrize("layer", ONE_NUMBER_A_LAYER)
def test_what_does_not_fit_is_one_sentence(layer: LayerSpec) -> None:
    rng = np.random.default_rng(3)
    feeds, operands = activations(layer, (1, 2), rng), weights(layer, rng)
    shrunk = [{name: value[:-1]} for name, value in operands.items() if value.shape != (1,)]
    wider = [{name: np.hstack([value, value])} for name, value in operands.items() if value.ndim == 2]
    for change in [*shrunk, *wider]:
        with pytest.raises(Exception, match=r"elements, not|values, and|, not \[|multiple"):
            run(one_layer(layer, {**operands, **change}), feeds, library())
    for name, value in itertools.product(layer.attributes, (-1, 0, 33, 2**40, -(2**63))):
        with pytest.raises(Exception, match=r"multiple of|, not \[|values, and"):
            run(one_layer(layer, operands, **{name: value}), feeds, library())
    for name, value in feeds.items():
        for other in (value[..., :-1], value[0], value[:, :1], value[None]):
            if (
                other.shape[-1] == value.shape[-1]
                and name == "x"
                and layer.outputs != ("y",)
                and other.ndim == 3
            ):
                other = np.concatenate([value, value])
            with pytest.raises(Exception, match=r"dimensions, not 3|dimension \d of|whole number of heads"):
                run(one_layer(layer, operands), {**feeds, name: np.ascontiguousarray(other)}, library())


@pytest.mark.native
def test_weights_that_are_no_initializers_are_refused() -> None:
    layer = next(iter(LAYERS.values()))
    rng = np.random.default_rng(4)
    feeds, operands = activations(layer, (1, 1), rng), weights(layer, rng)
    model = one_layer(layer, operands)
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "norm"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.append(helper.make_tensor_value_info("norm", TensorProto.FLOAT, [96]))
    with pytest.raises(Exception, match="norm is not an initializer"):
        run(model, {**feeds, "norm": operands["norm"]}, library())


def mask_model() -> onnx.ModelProto:
    names = ["attention_mask", "position_ids"]
    node = helper.make_node(MASK, names, ["visible"], domain=DOMAIN)
    graph = helper.make_graph(
        [node],
        "mask",
        [helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in names],
        [helper.make_tensor_value_info("visible", TensorProto.BOOL, None)],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions_for([node]))


@pytest.mark.native
def test_the_mask_is_the_same_in_numpy_in_the_body_and_in_the_library() -> None:
    rng = np.random.default_rng(5)
    for batch, queries, total in ((1, 1, 1), (1, 1, 40), (2, 7, 7), (3, 4, 9), (2, 5, 3)):
        mask = rng.integers(0, 3, (batch, total))
        feeds = {"attention_mask": mask, "position_ids": np.zeros((batch, queries), np.int64)}
        expected = decoder_mask(*feeds.values())
        for path in (None, library()):
            (visible,) = run(mask_model(), feeds, path)
            np.testing.assert_array_equal(visible, expected)
    for bad in ({"attention_mask": mask[0]}, {"position_ids": np.zeros((9, 2), np.int64)}):
        with pytest.raises(Exception, match=r"dimensions|differ in batch"):
            run(mask_model(), {**feeds, **bad}, library())


def test_the_float_steps_are_right() -> None:
    """Near the functions that they stand for: their order is fixed, and their values are those of mathematics."""
    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    np.testing.assert_allclose(exponential(x), np.exp(x.astype(np.float64)), rtol=3e-7)
    assert exponential(np.array([-1e30, 1e30], np.float32)) == pytest.approx(np.exp([-87.0, 88.0]), rel=3e-7)
    rng = np.random.default_rng(6)
    row, weight = rng.standard_normal((2, 3, 4864)).astype(np.float32)
    wide = row.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPSILON) * weight
    np.testing.assert_allclose(normalize(row, weight, np.float32(EPSILON)), expected, rtol=1e-5)
