"""`--lowering matmulnbits|qdq`: the same integers and scales in other operators, and the paths that they take."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from click.testing import CliRunner
from conftest import seeded_model, tiny_config
from onnx import numpy_helper

from microvlm.backends import load
from microvlm.bench.bench_command import command as bench
from microvlm.bench.kernels.contender_formats import unpack_blocks
from microvlm.commands.main import cli
from microvlm.console import run_click
from microvlm.errors import UserError
from microvlm.exporters import contract
from microvlm.exporters.export_command import command as export_command
from microvlm.exporters.external_data import WeightStore, save_graph
from microvlm.exporters.lowerings import product_nodes
from microvlm.exporters.lowerings.lowered_check import check_lowered
from microvlm.exporters.lowerings.onnx_support import support_of
from microvlm.exporters.lowerings.product_nodes import ACCURACY_LEVEL, replace_products
from microvlm.exporters.tracing import trace
from microvlm.formats.manifest import read_manifest
from microvlm.formats.op_table import MATMUL_BY_KIND
from microvlm.formats.weight_format import LOWERINGS, WeightFormat
from microvlm.model.checkpoint import describe_lowered
from microvlm.model.lowering import lower, set_traced
from microvlm.model.microvlm import MicroVLM

GRAPH = "memory_encode"
"""The smallest graph with ternary products."""
OTHERS = [lowering for lowering in LOWERINGS if lowering != "custom"]


def saved(lowered: MicroVLM, lowering: str, folder: Path) -> Path:
    set_traced(lowered, True)
    graph = trace(lowered, contract.graph(lowered.config, GRAPH), fuses=False)
    columns = {name: layer.columns for name, layer in describe_lowered(lowered).items()}
    assert replace_products(graph, lowering, columns).total() > 0
    save_graph(graph, GRAPH, WeightStore(folder))
    return folder / f"{GRAPH}.onnx"


def matrices(path: Path) -> dict[str, tuple[np.ndarray, int]]:
    """Layer -> (float32 [N, K], bits), read from a graph without the exporter's code."""
    model = onnx.load(str(path))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    widths = {onnx.TensorProto.INT2: 2, onnx.TensorProto.INT4: 4, onnx.TensorProto.INT8: 8}
    found = {}
    for node in model.graph.node:
        facts = {each.name: each.i for each in node.attribute}
        if node.op_type == "MatMulNBits":
            assert facts["accuracy_level"] == ACCURACY_LEVEL == 4
            packed, scales = arrays[node.input[1]], arrays[node.input[2]]
            integers = unpack_blocks(packed, facts["bits"]).astype(np.int16) - (1 << (facts["bits"] - 1))
            assert not integers[:, facts["K"] :].any()
            scales = np.repeat(scales.reshape(facts["N"], -1), facts["block_size"], 1)
            floats = (integers * scales)[:, : facts["K"]].astype(np.float32)
            found[node.input[1].rpartition(".")[0]] = floats, facts["bits"]
        elif node.op_type == "DequantizeLinear":
            integers = arrays[node.input[0]].astype(np.float32)
            scales = np.repeat(arrays[node.input[1]], facts["block_size"], 0)[: len(integers)]
            found[node.input[0].rpartition(".")[0]] = (integers * scales).T, widths[types[node.input[0]]]
    return found


@pytest.mark.parametrize(
    ("bits", "packing", "width"), [(1.58, "2bit", 2), (1.58, "base3", 2), (8, "2bit", 8), (4, "2bit", 4)]
)
@pytest.mark.parametrize("lowering", OTHERS)
@pytest.mark.export
def test_every_weight_is_the_same_in_other_operators(
    lowering, bits, packing, width, ternary_model, float_model, tmp_path
):
    lowered = lower(ternary_model if bits == 1.58 else float_model, WeightFormat(bits, packing))
    path = saved(lowered, lowering, tmp_path)
    found = matrices(path)
    layers = {
        name: layer for name, layer in lowered.memory_encoder.named_modules() if hasattr(layer, "integers")
    }
    products = {f"memory_encoder.{name}": layer for name, layer in layers.items()}
    assert found.keys() == products.keys()
    assert {each for _, each in found.values()} == {width}
    for name, layer in products.items():
        op, state = MATMUL_BY_KIND[layer.kind], layer.state_dict()
        operands = [state[operand].numpy() for operand in op.weight_names[:-1]]
        integers = op.unpack(*operands, rows=layer.rows, columns=layer.columns)
        expected = integers.astype(np.float32) * state["scale"].numpy().reshape(-1, 1)
        # Four bits: (integer * multiplier) * scale here, integer * (multiplier * scale) there.
        np.testing.assert_allclose(found[name][0], expected, rtol=0 if width != 4 else 3e-7, atol=0)
    checks, _ = check_lowered(lowered, contract.graph(lowered.config, GRAPH), path, threads=1)
    assert checks
    assert all(check.passed for check in checks)
    assert {function.name for function in onnx.load(path).functions}.isdisjoint(
        op.name for op in MATMUL_BY_KIND.values()
    )


@pytest.mark.export
def test_another_models_graph_fails_the_check(ternary_model, tmp_path):
    path = saved(lower(ternary_model, WeightFormat()), "matmulnbits", tmp_path)
    other = lower(seeded_model(tiny_config(), seed=5), WeightFormat())
    checks, _ = check_lowered(other, contract.graph(other.config, GRAPH), path, threads=1)
    assert not all(check.passed for check in checks)


def test_the_versions_that_hold_a_type_are_found_by_trying():
    assert support_of(onnx_ir.DataType.INT8).opset == contract.OPSET
    assert support_of(onnx_ir.DataType.INT4).opset == contract.OPSET
    two_bits = support_of(onnx_ir.DataType.INT2)
    # onnx 1.20 is the first with the type, as of opset 25.
    assert two_bits is None or two_bits.opset >= 25
    assert support_of(onnx_ir.DataType.STRING) is None


@pytest.fixture(scope="module")
def bundles(speaking_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same checkpoint, exported to each of the others' operators by the command."""
    folder = tmp_path_factory.mktemp("lowerings")
    for lowering in OTHERS:
        arguments = [str(speaking_checkpoint), "-o", str(folder / lowering), "--lowering", lowering]
        result = CliRunner().invoke(export_command, arguments, standalone_mode=False)
        assert result.exception is None, result.output
        assert ("2 bits by" if lowering == "matmulnbits" else "INT2 by") in result.output
    return {lowering: folder / lowering for lowering in OTHERS}


def paths(*arguments: str) -> list[dict]:
    result = CliRunner().invoke(bench, ["paths", *arguments, "--json"], standalone_mode=False)
    assert result.exception is None, result.output
    (bundle,) = json.loads(result.stdout)["bundles"]
    return bundle["products"]


@pytest.mark.export
@pytest.mark.parametrize("lowering", OTHERS)
def test_a_bundle_of_others_operators_answers_and_says_what_it_needs(lowering, bundles, speaking_bundle):
    manifest = read_manifest(bundles[lowering])
    assert manifest.lowering == lowering
    assert manifest.bits_per_weight == {}
    model = onnx.load(
        str(bundles[lowering] / manifest.graphs["decoder_model_merged"].file), load_external_data=False
    )
    assert manifest.versions["ir"] >= model.ir_version
    assert manifest.versions["opset"] == max(each.version for each in model.opset_import if not each.domain)
    if lowering == "qdq":
        tried = {entry["type"]: entry for entry in manifest.versions["types"]}
        assert tried["INT2"]["opset"] == manifest.versions["opset"]
    ours, others = load("ort", speaking_bundle, 1), load("ort", bundles[lowering], 1)
    assert ours.fingerprint == others.fingerprint
    side = ours.config.vision.image_size
    pixels = np.random.default_rng(0).standard_normal((1, 3, side, side), np.float32)
    expected, given = ours.encode_image(pixels), others.encode_image(pixels)
    assert np.linalg.norm(given - expected) < 0.1 * np.linalg.norm(expected)
    with pytest.raises(UserError, match="--backend ort"):
        load("torch", bundles[lowering])


@pytest.mark.export
def test_the_path_of_every_product_is_told(bundles, speaking_bundle):
    shapes = {}
    for lowering, bundle in {"custom": speaking_bundle, **bundles}.items():
        products = paths(str(bundle))
        shapes[lowering] = sorted(
            (row["graph"], row["columns"], row["rows"], row["count"]) for row in products
        )
        assert {row["provider"] for row in products} == {"CPUExecutionProvider"}
        if lowering != "custom":
            assert {row["runs_as"] for row in products} == {"MatMulNBits"}
            assert {row["accuracy_level"] for row in products} == {4}
            assert {row["bits"] for row in products if row["graph"] == GRAPH} == {2}
            assert {row["is_replaced"] for row in products} == {lowering == "qdq"}
    assert sum(count for *_, count in shapes["qdq"]) == sum(count for *_, count in shapes["custom"])
    assert shapes["qdq"] == shapes["matmulnbits"]


@pytest.mark.export
def test_functions_are_told_from_kernels(speaking_bundle, native_library):
    native, functions = paths(str(speaking_bundle), "--native"), paths(str(speaking_bundle), "--functions")
    assert not any(row["is_replaced"] for row in native)
    # The learned queries of the adapter are constants: ONNX Runtime multiplies them when it loads the graph.
    assert {row["runs_as"] for row in functions} == {
        "ONNX operators of its function",
        "a constant, computed at load",
    }
    (folded,) = [row for row in functions if row["runs_as"] == "a constant, computed at load"]
    assert (folded["graph"], folded["provider"], folded["count"]) == ("vision_encoder", "none", 1)
    assert all(row["is_replaced"] and row["accuracy_level"] is None for row in functions)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--bits", "16", "--lowering", "qdq"], "--lowering qdq is of integer weights, and --bits is 16"),
        (["--lowering", "matmulnbits", "--genai"], "--genai is for --lowering custom"),
        (["--lowering", "int2"], "int2"),
    ],
)
def test_lowerings_that_make_no_sense_are_refused(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_click(export_command, ["no-such-model", *arguments])
    assert exit_info.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.export
def test_info_says_what_reads_such_a_bundle(bundles, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_click(cli, ["info", str(bundles["qdq"])])
    assert exit_info.value.code == 2
    assert "which only its graphs can read" in capsys.readouterr().err


@pytest.mark.export
def test_trits_take_four_bits_where_two_are_not_held(ternary_model, tmp_path, monkeypatch):
    held = product_nodes.support_of
    monkeypatch.setattr(
        product_nodes, "support_of", lambda each: None if each is onnx_ir.DataType.INT2 else held(each)
    )
    lowered = lower(ternary_model, WeightFormat())
    path = saved(lowered, "qdq", tmp_path)
    assert {width for _, width in matrices(path).values()} == {4}
    checks, _ = check_lowered(lowered, contract.graph(lowered.config, GRAPH), path, threads=1)
    assert all(check.passed for check in checks)
    monkeypatch.setattr(product_nodes, "support_of", lambda each: None)
    with pytest.raises(UserError, match="upgrade them, or take --lowering matmulnbits"):
        saved(lowered, "qdq", tmp_path)
