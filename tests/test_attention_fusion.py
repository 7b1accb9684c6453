"""The rewriting of a traced attention: the same numbers in fewer nodes, and hands off what it does not know."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import onnxruntime
import pytest
from conftest import seeded_model, tiny_config
from onnx_ir.passes import common

from microvlm.exporters.bundle_writer import export
from microvlm.exporters.fusion.attention_fusion import fuse_attention
from microvlm.formats.weight_format import WeightFormat

HEADS, KV_HEADS, WIDTH = 4, 2, 8
SHAPES = {"q": (2, 3, HEADS * WIDTH), "k": (2, 3, KV_HEADS * WIDTH), "v": (2, 3, KV_HEADS * WIDTH)}
PAST = (2, KV_HEADS, 5, WIDTH)

ROTATED = """
    NAME_upper = Slice (NAME_heads, four, far, last, one)
    NAME_negated = Neg (NAME_upper)
    NAME_lower = Slice (NAME_heads, zero, four, last, one)
    NAME_turned = Concat <axis = -1> (NAME_negated, NAME_lower)
    NAME_cos = Mul (NAME_heads, cos)
    NAME_sin = Mul (NAME_turned, sin)
    NAME_rotated = Add (NAME_cos, NAME_sin)
"""
TRACED = f"""
<ir_version: 10, opset_import: ["" : 23]>
attention (float[2, 3, 32] q, float[2, 3, 16] k, float[2, 3, 16] v, float[2, 3, 4] angles, bool[2, 1, 3, 8] mask,
           float[2, 2, 5, 8] past_k, float[2, 2, 5, 8] past_v)
    => (float[2, 3, 32] y, float[2, 2, 8, 8] present_k, float[2, 2, 8, 8] present_v) {{
    zero = Constant <value = int64[1] {{0}}> ()
    one = Constant <value = int64[1] {{1}}> ()
    four = Constant <value = int64[1] {{4}}> ()
    last = Constant <value = int64[1] {{3}}> ()
    far = Constant <value = int64[1] {{9223372036854775807}}> ()
    q_shape = Constant <value = int64[4] {{2, 3, {HEADS}, {WIDTH}}}> ()
    kv_shape = Constant <value = int64[4] {{2, 3, {KV_HEADS}, {WIDTH}}}> ()
    y_shape = Constant <value = int64[3] {{2, 3, {HEADS * WIDTH}}}> ()
    q_split = Reshape (q, q_shape)
    k_split = Reshape (k, kv_shape)
    v_split = Reshape (v, kv_shape)
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q_split)
    k_heads = Transpose <perm = [0, 2, 1, 3]> (k_split)
    v_heads = Transpose <perm = [0, 2, 1, 3]> (v_split)
    both = Concat <axis = -1> (angles, angles)
    table = Unsqueeze (both, one)
    cos = Cos (table)
    sin = Sin (table)
    {ROTATED.replace("NAME", "q")}{ROTATED.replace("NAME", "k")}
    present_k = Concat <axis = 2> (past_k, k_rotated)
    present_v = Concat <axis = 2> (past_v, v_heads)
    mixed = Attention (q_rotated, present_k, present_v, mask)
    merged = Transpose <perm = [0, 2, 1, 3]> (mixed)
    y = Reshape (merged, y_shape)
}}"""


def rewritten(text: str) -> onnx.ModelProto:
    model = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    fuse_attention(model.graph)
    common.RemoveUnusedNodesPass()(model)
    proto = onnx_ir.to_proto(model)
    onnx.checker.check_model(proto)
    return proto


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    feeds |= {name: rng.standard_normal(PAST, np.float32) for name in ("past_k", "past_v")}
    feeds["angles"] = rng.uniform(0, 50, (2, 3, WIDTH // 2)).astype(np.float32)
    feeds["mask"] = np.ones((2, 1, 3, 8), bool)
    feeds["mask"][0, 0, :, 0] = False
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def op_types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.op_type != "Constant"]


def test_a_rotated_attention_with_a_cache_becomes_five_nodes_with_the_same_numbers():
    fused = rewritten(TRACED)
    assert sorted(op_types(fused)) == ["Attention", "Cos", "RotaryEmbedding", "RotaryEmbedding", "Sin"]
    for before, after in zip(run(onnx.parser.parse_model(TRACED)), run(fused), strict=True):
        np.testing.assert_allclose(after, before, atol=2e-6)


def test_a_scale_of_its_own_is_kept():
    text = TRACED.replace("mixed = Attention (", "mixed = Attention <scale = 0.5> (")
    fused = rewritten(text)
    assert "Transpose" not in op_types(fused)
    for before, after in zip(run(onnx.parser.parse_model(text)), run(fused), strict=True):
        np.testing.assert_allclose(after, before, atol=2e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("q_lower = Slice (q_heads, zero, four", "q_lower = Slice (q_heads, four, far"),
        ("k_negated = Neg (k_upper)", "k_negated = Abs (k_upper)"),
        ("q_sin = Mul (q_turned, sin)", "q_sin = Mul (q_turned, cos)"),
        ("q_lower = Slice (q_heads", "q_lower = Slice (q_negated_again"),
        ("v_heads = Transpose <perm = [0, 2, 1, 3]>", "v_heads = Transpose <perm = [0, 2, 3, 1]>"),
    ],
)
def test_another_arithmetic_stays_as_it_is(old, new):
    assert old in TRACED
    text = TRACED.replace(old, new)
    if "negated_again" in new:
        text = text.replace("q_upper = Slice", "q_negated_again = Neg (q_heads)\n    q_upper = Slice")
    if "[0, 2, 3, 1]" in new:
        text = text.replace("v_split = Reshape (v, kv_shape)", "v_split = Reshape (v, v_shape)").replace(
            "q_split = Reshape",
            "v_shape = Constant <value = int64[4] {2, 8, 2, 3}> ()\n    q_split = Reshape",
        )
    before = onnx.parser.parse_model(text)
    fused = rewritten(text)
    assert op_types(fused) == op_types(before)
    for array, fused_array in zip(run(before), run(fused), strict=True):
        assert np.array_equal(array, fused_array)


def test_a_decoder_with_inner_norms_and_no_biases_is_exported(tmp_path: Path):
    """As a Llama or SmolLM2 that was distilled: ONNX infers a width of 0 of what attention mixes, unless it is told."""
    config = tiny_config()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, attention_bias=False))
    seeded_model(config).save_pretrained(tmp_path / "checkpoint")
    report = export(tmp_path / "checkpoint", tmp_path / "bundle", WeightFormat(1.58), threads=1)
    assert all(check.passed for check in report.checks)
    for name in ("memory_encode", "decoder_model_merged"):
        path = tmp_path / "bundle" / "onnx" / f"{name}.onnx"
        graph = onnx.load(path, load_external_data=False).graph
        assert any(node.op_type == "FeedForward2x4" for node in graph.node)
        assert all("bias" not in tensor.name for tensor in graph.initializer)
        # Without the native library, by the functions in the file.
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
