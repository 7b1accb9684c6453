"""The table of shapes is the model's, at every storage, and a checkpoint that does not fit is refused by its header."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TERNARY, seeded_model, tiny_config
from safetensors.torch import load_file, save_file

from microvlm.config import MicroVLMConfig, QuantizationConfig
from microvlm.errors import UserError
from microvlm.formats.lowered_layer import LoweredLayer
from microvlm.formats.weight_format import WeightFormat
from microvlm.formats.weight_shapes import FLOAT, TensorType, stored_types, weight_shapes
from microvlm.model.checkpoint import describe_lowered, load_checkpoint
from microvlm.model.lowering import lower
from microvlm.model.microvlm import MicroVLM
from microvlm.presets import preset, preset_names


def shapes_of(config: MicroVLMConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in MicroVLM(config).state_dict().items()}


@pytest.mark.parametrize("name", preset_names())
def test_the_table_has_the_shapes_of_every_preset(name):
    assert weight_shapes(preset(name)) == shapes_of(preset(name))


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("vision", {"distillation_token": False}),
        ("vision", {"patch_size": 4, "num_hidden_layers": 3}),
        ("text", {"attention_bias": False, "sub_norm": False}),
        ("text", {"num_hidden_layers": 3, "head_dim": 16, "num_key_value_heads": 2}),
        ("memory", {"readout_size": 0, "encoder_layers": 1}),
        ("memory", {"slots": 5, "code_size": 7}),
    ],
)
def test_the_table_follows_every_field(part, changes):
    config = tiny_config()
    config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **changes)})
    assert weight_shapes(config) == shapes_of(config)


@pytest.mark.parametrize("widths", [TERNARY, QuantizationConfig()], ids=["ternary", "float"])
@pytest.mark.parametrize(
    "weights",
    [
        WeightFormat(),
        WeightFormat(packing="base3", embedding_bits=4),
        WeightFormat(bits=8, embedding_bits=16),
        WeightFormat(bits=4, embedding_bits=32),
        WeightFormat(bits=16),
        WeightFormat(bits=32),
    ],
    ids=lambda weights: f"{weights.bits}-{weights.packing}-{weights.embedding_bits}",
)
def test_the_table_has_the_types_of_every_storage(weights, widths):
    model = lower(seeded_model(tiny_config(widths)), weights)
    expected = {
        name: TensorType(
            tuple(value.shape), FLOAT if value.is_floating_point() else str(value.dtype).partition(".")[2]
        )
        for name, value in model.state_dict().items()
    }
    assert stored_types(model.config, describe_lowered(model), "it") == expected


PACKED = LoweredLayer(kind="ternary2x4", rows=96, columns=64, scale=1, bias=False)


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("decoder.layers.0.mlp.up_proj", {"rows": 95}, "as 95 x 64 without a bias, and the configuration as 96 x 64"),
        ("decoder.layers.0.mlp.up_proj", {"columns": 2**31 - 1}, "2147483647 without a bias"),
        ("decoder.layers.0.mlp.up_proj", {"bias": True}, "96 x 64 with a bias, and the configuration as 96 x 64 with"),
        ("decoder.layers.0.mlp.up_proj", {"scale": 5}, "a wrong number of scales"),
        ("decoder.layers.0.mlp.up_proj", {"scale": None}, "a wrong number of scales"),
        ("decoder.layers.0.mlp.up_proj", {"kind": "int8"}, "a wrong number of scales"),
        ("decoder.layers.0.mlp.up_proj", {"kind": "half-embedding"}, "that this model does not have"),
        ("decoder.layers.0.mlp.up_proj", {"kind": "ternary9x9"}, "'ternary9x9', which this version does not know"),
        ("decoder.layers.2.mlp.up_proj", {}, "that this model does not have"),
        ("decoder.norm", {}, "that this model does not have"),
        ("decoder.forward", {}, "that this model does not have"),
        ("", {}, "that this model does not have"),
        ("embedding", {"kind": "int8", "rows": 300, "scale": 300}, "that this model does not have"),
        ("embedding.table", {"kind": "half-embedding", "rows": 300}, "that this model does not have"),
        ("memory_prior", {}, "that this model does not have"),
    ],
)  # fmt: skip
def test_a_layer_that_is_not_the_models_is_told(name, change, part):
    values = {field: getattr(PACKED, field) for field in PACKED.__struct_fields__}
    with pytest.raises(UserError) as caught:
        stored_types(tiny_config(), {name: LoweredLayer(**{**values, **change})}, "a.safetensors")
    assert part in str(caught.value)


@pytest.fixture
def packed_checkpoint(tmp_path: Path) -> Path:
    lower(seeded_model(tiny_config()), WeightFormat()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


LIMITED = """
import resource, sys
import torch
import microvlm.model.checkpoint as checkpoint
from microvlm.errors import UserError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000,) * 2)
try:
    checkpoint.load_checkpoint(sys.argv[1])
except UserError as error:
    print(error)
"""


def change_config(folder: Path, part: str, values: dict[str, Any]) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (raw[part] if part else raw).update(values)
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.posix
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux's /proc says what is used")
@pytest.mark.parametrize(
    ("part", "values", "sentence"),
    [
        ("text", {"vocab_size": 10_000_000}, "the configuration as 10000000 x 64"),
        (
            "text",
            {"num_hidden_layers": 1024},
            "'memory_projection.linear' as 128 x 48 with a bias, and the configuration as 65536",
        ),
        (
            "text",
            {"num_hidden_layers": 4_000_000_000},
            "'text.num_hidden_layers' must be a whole number <= 1024",
        ),
        ("text", {"intermediate_size": 262_144}, "the configuration as 262144 x 64"),
        ("vision", {"image_size": 2048}, "is (1, 18, 48) in"),
        ("vision", {"image_size": 12_000}, "'vision.image_size' must be a whole number <= 2048"),
        ("memory", {"slots": 200_000, "code_size": 262_144}, "the configuration as"),
        ("", {"prefix_tokens": 200}, "'adapter.places' is (1, 4, 64) in"),
        ("", {"prefix_tokens": 1_000_000}, "'prefix_tokens' must be a whole number <= 16384"),
    ],
)
def test_sizes_are_held_against_the_header_in_little_memory_and_time(
    part, values, sentence, packed_checkpoint
):
    change_config(packed_checkpoint, part, values)
    began = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-P", "-c", LIMITED, str(packed_checkpoint)], capture_output=True, text=True
    )
    assert time.monotonic() - began < 60  # importing torch takes nearly all of it
    assert process.returncode == 0, process.stderr
    assert sentence in process.stdout
    assert process.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("weights", "byte"),
    [
        (WeightFormat(), 255),
        (WeightFormat(packing="base3"), 243),
        (WeightFormat(bits=8), 0),
        (WeightFormat(bits=4), 0x0F),
    ],
    ids=["2bit", "base3", "int8", "int4"],
)
def test_bytes_that_no_packing_writes_are_told_with_the_layer(weights, byte, tmp_path):
    lower(seeded_model(tiny_config()), weights).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8:][:header_bytes])
    tensors = load_file(path)
    tensors["decoder.layers.1.mlp.up_proj.packed"][0, 3] = byte
    save_file(tensors, path, metadata=header["__metadata__"])
    with pytest.raises(
        UserError, match=r"model\.safetensors is damaged: 'decoder\.layers\.1\.mlp\.up_proj' has"
    ):
        load_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("value", [2.0, 0.5, float("nan"), float("inf")])
def test_a_dense_layer_of_other_values_than_trits_is_told(value, tmp_path):
    model = lower(seeded_model(tiny_config()), WeightFormat(bits=16))
    model.get_submodule("decoder.layers.1.mlp.up_proj").weight[0, 3] = value
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"'decoder\.layers\.1\.mlp\.up_proj' has weights that its storage"):
        load_checkpoint(tmp_path / "model")
