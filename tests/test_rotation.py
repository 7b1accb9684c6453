"""A decoder whose residual stream is rotated: the operator, the weights that are rotated alike, bundles, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from assembled_start import assembled_start
from conftest import seeded_model, tiny_config
from onnx import TensorProto, helper

from microvlm import MicroVLM
from microvlm.backends import native
from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.exporters.bundle_writer import export
from microvlm.exporters.contract import OPSET
from microvlm.exporters.function_bodies import functions_for
from microvlm.formats.layer_table import ROTATION, rotate_blocks
from microvlm.formats.op_table import DOMAIN, DOMAIN_VERSION
from microvlm.formats.weight_format import WeightFormat
from microvlm.model import torch_ops
from microvlm.model.checkpoint import load_checkpoint
from microvlm.training.ternary_designs.designed_linear import hadamard
from microvlm.training.warm_start import start_from, take_decoder

WIDTHS = (4, 16, 64)


def rotated(config: MicroVLMConfig, width: int = 16) -> MicroVLMConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, rotation=width))


def rotation_model(width: int) -> onnx.ModelProto:
    node = helper.make_node(ROTATION, ["x"], ["y"], domain=DOMAIN, width=width)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    graph = helper.make_graph([node], "rotation", values[:1], values[1:])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions_for([node]))


def run(model: onnx.ModelProto, x: np.ndarray, library: Path | None) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_reference_is_a_product_with_hadamards_matrix(width):
    x = np.random.default_rng(0).standard_normal((2, 3, 192)).astype(np.float32)
    blocks = x.astype(np.float64).reshape(-1, width)
    expected = blocks @ hadamard(width, torch.ones(1, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(rotate_blocks(x, width), expected.reshape(x.shape), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rotate_blocks(rotate_blocks(x, width), width), x, rtol=1e-5, atol=1e-5)


@pytest.mark.native
@pytest.mark.parametrize("width", WIDTHS)
def test_numpy_torch_the_body_and_the_library_give_the_same_bits(width):
    rng = np.random.default_rng(width)
    library = native.library_path()
    assert library is not None, native.absence()
    for shape in ((64,), (3, 128), (2, 5, 192), (1, 0, 64), (1, 7, 576)):
        x = (rng.standard_normal(shape) * 10.0 ** rng.integers(-30, 30, shape)).astype(np.float32)
        expected = rotate_blocks(x, width)
        found = [torch_ops.rotate_blocks(torch.from_numpy(x), width).numpy()]
        found += [run(rotation_model(width), x, path) for path in (None, library)]
        for y in found:
            np.testing.assert_array_equal(y, expected)


@pytest.mark.native
def test_hostile_rotations_are_refused():
    library = native.library_path()
    with pytest.raises(Exception, match="no multiple of the rotation's width"):
        run(rotation_model(64), np.ones((2, 96), np.float32), library)
    model = rotation_model(64)
    model.graph.node[0].attribute[0].i = 48
    with pytest.raises(Exception, match="width of a rotation is 4, 16 or 64"):
        run(model, np.ones((2, 96), np.float32), library)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_trace_expects_is_what_comes(dtype):
    for shape in ((3, 64), (2, 5, 128)):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        torch.library.opcheck(torch_ops.rotate_blocks, (x, 64))
        y = torch_ops.rotate_blocks(x, 64)
        assert (y.dtype, y.is_contiguous()) == (torch.float32, True)
        y.sum().backward()
        assert x.grad.dtype == dtype


def test_gradients_are_rotated_back():
    x = torch.randn(3, 64, requires_grad=True)
    direction = torch.randn(3, 64)
    (torch_ops.rotate_blocks(x, 64) * direction).sum().backward()
    assert torch.equal(x.grad, torch_ops.rotate_blocks(direction, 64))


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_processor) -> Path:
    return assembled_start(tmp_path_factory.mktemp("start") / "start", tiny_processor.tokenizer)


@pytest.mark.parametrize("width", [16, 64])
def test_a_float_decoder_computes_the_same_when_its_stream_is_rotated(start, width):
    plain = load_checkpoint(start)
    model = MicroVLM(rotated(plain.config, width))
    assert start_from(model, str(start)) == []
    name = "decoder.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(model.state_dict()[name], plain.state_dict()[name])
    ids = torch.arange(5, 45).reshape(4, 10)
    states = [m.hidden_states(m.embed(ids), torch.ones_like(ids)) for m in (plain, model)]
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-4)


def test_only_a_rotation_is_written(start):
    plain = load_checkpoint(start).config
    assert "rotation" not in plain.to_dict()["text"]
    turned = rotated(plain)
    assert MicroVLMConfig.from_dict(turned.to_dict()) == turned
    older = turned.to_dict()
    older["text"]["rotation"] = 0
    assert MicroVLMConfig.from_dict(older) == plain


def test_a_rotated_decoder_is_kept_and_another_rotation_refused(start, tmp_path, tiny_processor):
    model = seeded_model(rotated(tiny_config(), 16))
    model.save_pretrained(tmp_path / "ternary")
    tiny_processor.save(tmp_path / "ternary")
    stored = load_checkpoint(tmp_path / "ternary")
    again = MicroVLM(stored.config)
    take_decoder(again, str(tmp_path / "ternary"))
    ids = torch.arange(5, 15)[None]
    embeds = stored.embed(ids)
    with torch.no_grad():
        found = [m.hidden_states(embeds, torch.ones_like(ids)) for m in (stored, again)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="rotation of 16, which a stage with one of 64 cannot change"):
        start_from(MicroVLM(rotated(tiny_config(), 64)), str(tmp_path / "ternary"))


def run_decoder(path: Path, config: MicroVLMConfig, library: Path | None) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    sizes = {"batch": 1, "sequence": 5, "past": 3, "past + sequence": 8}
    rng, feeds = np.random.default_rng(0), {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else sizes[size] for size in value.shape]
        is_float = value.type == "tensor(float)"
        feeds[value.name] = (
            rng.standard_normal(shape).astype(np.float32) if is_float else np.ones(shape, np.int64)
        )
    return session.run(None, feeds)


@pytest.mark.export
@pytest.mark.parametrize("bits", [1.58, 8])
def test_a_bundle_of_a_rotated_decoder_computes_what_torch_does(bits, tmp_path):
    config = rotated(tiny_config())
    if bits == 8:
        widths = dataclasses.replace(config.quantization, decoder_bits=32)
        config = dataclasses.replace(config, quantization=widths)
    seeded_model(config).save_pretrained(tmp_path / "checkpoint")
    report = export(tmp_path / "checkpoint", tmp_path / "bundle", WeightFormat(bits), threads=1)
    assert all(check.passed for check in report.checks)
    path = tmp_path / "bundle" / "onnx" / "decoder_model_merged.onnx"
    proto = onnx.load(path, load_external_data=False)
    op_types = [node.op_type for node in proto.graph.node]
    assert op_types.count(ROTATION) == 2
    # The layers between are those of any other ternary decoder.
    assert op_types.count("FeedForward2x4") == (config.text.num_hidden_layers if bits == 1.58 else 0)
    # Without the native library, by the functions in the file: the same bits where integers are summed.
    outputs = [run_decoder(path, config, library) for library in (None, native.library_path())]
    for plain, fast in zip(*outputs, strict=True):
        np.testing.assert_array_equal(plain, fast)
    assert MicroVLMConfig.load(tmp_path / "bundle").text.rotation == 16


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"rotation": 48}, "rotation"), ({"rotation": 64, "hidden_size": 96}, "must divide 'hidden_size'")],
)
def test_rotations_that_do_not_fit_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(tiny_config().text, **changes)
