"""Every ternary packing of the table, from lowering to ONNX Runtime and back: the numbers do not change on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from microvlm.backends import native
from microvlm.exporters import contract
from microvlm.exporters.external_data import WeightStore, save_graph
from microvlm.exporters.graph_check import check_graph
from microvlm.exporters.replay.graph_probe import expand_layers
from microvlm.exporters.tracing import trace
from microvlm.formats.op_table import MATMUL_BY_KIND, MATMUL_BY_PACKING
from microvlm.formats.packed_bytes import is_packed
from microvlm.formats.weight_format import PACKING_HELP, WeightFormat
from microvlm.model.checkpoint import load_checkpoint, save_checkpoint
from microvlm.model.linear import TernaryLinear, ternarize
from microvlm.model.lowering import lower, set_traced
from microvlm.model.microvlm import MicroVLM

ALL_BYTES = np.arange(256, dtype=np.uint8)
GRAPH = "memory_encode"
"""The smallest graph with ternary products."""


def keys_of(model: MicroVLM) -> torch.Tensor:
    """A result of the graph's method: the memory keys of two seeded sequences."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 5, model.config.text.hidden_size, generator=generator)
    with torch.no_grad():
        return model.memory_encode(embeddings, torch.ones(2, 5, dtype=torch.int64))[1]


@pytest.mark.parametrize("packing", MATMUL_BY_PACKING)
@pytest.mark.export
def test_a_packing_keeps_every_number_from_lowering_to_onnxruntime_and_back(
    packing: str, ternary_model: MicroVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.library_path() is None
    op = MATMUL_BY_PACKING[packing]
    expected = keys_of(ternary_model)

    lowered = lower(ternary_model, WeightFormat(packing=packing))
    assert torch.equal(keys_of(lowered), expected)
    set_traced(lowered, True)
    assert torch.equal(keys_of(lowered), expected)

    save_checkpoint(lowered, tmp_path / "checkpoint")
    loaded_model = load_checkpoint(tmp_path / "checkpoint")
    assert {layer.kind for layer in loaded_model.decoder.modules() if hasattr(layer, "kind")} == {op.kind}
    assert torch.equal(keys_of(loaded_model), expected)

    set_traced(loaded_model, True)
    spec = contract.graph(loaded_model.config, GRAPH)
    save_graph(trace(loaded_model, spec), spec.name, WeightStore(tmp_path))
    checks, remark = check_graph(loaded_model, spec, tmp_path / f"{GRAPH}.onnx", threads=1)
    assert checks
    assert all(check.passed for check in checks), (checks, remark)

    model = onnx.load(tmp_path / f"{GRAPH}.onnx")
    assert op.name in {function.name for function in model.functions}
    assert_nodes_hold_the_trits(model, op.name, ternary_model)


def assert_nodes_hold_the_trits(model: onnx.ModelProto, op_name: str, model_in_torch: MicroVLM) -> None:
    """Every ternary layer of the encoder is a node whose bytes unpack to the trits that were trained."""
    op = next(op for op in MATMUL_BY_KIND.values() if op.name == op_name)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [node for node in expand_layers(model)[0].graph.node if node.op_type == op_name]
    modules = model_in_torch.memory_encoder.named_modules(prefix="memory_encoder")
    layers = {name: layer for name, layer in modules if isinstance(layer, TernaryLinear)}
    assert {node.input[1].removesuffix(".packed") for node in nodes} == set(layers)
    for name, layer in layers.items():
        trits, scale = ternarize(layer.weight)
        rows, columns = trits.shape
        unpacked = op.unpack(arrays[f"{name}.packed"], rows=rows, columns=columns)
        np.testing.assert_array_equal(unpacked, trits.detach().numpy())
        np.testing.assert_array_equal(arrays[f"{name}.scale"], scale.detach().numpy())


def test_the_help_of_the_flag_names_every_packing() -> None:
    assert f"Bytes of ternary weights: {' or '.join(MATMUL_BY_PACKING)}." == PACKING_HELP


@pytest.mark.parametrize("kind", MATMUL_BY_KIND)
def test_the_bytes_that_a_packing_writes_are_told_from_others(kind: str) -> None:
    op = MATMUL_BY_KIND[kind]
    integers = np.random.default_rng(0).integers(-1, 2, (40 * op.rows_per_byte, 64), dtype=np.int8)
    packed = op.pack(integers)[0]
    assert is_packed(op, packed)
    written = [is_packed(op, byte) for byte in ALL_BYTES]
    expected = {"ternary2x4": 3**4, "ternary3x5": 3**5, "int8": 255, "int4": 15 * 15}
    assert sum(written) == expected.get(kind, sum(written)) > 0
    assert not all(written) or kind not in expected
