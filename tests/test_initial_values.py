"""Models that are loaded are built empty: nothing is drawn, and torch's compiler is not imported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from test_api import loaded_after

from microvlm.model.initial_values import empty_modules
from microvlm.model.microvlm import MicroVLM


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_a_load_in_a_fresh_process_does_not_import_torchs_compiler(
    kind: str, tiny_checkpoint: Path, tiny_bundle: Path
) -> None:
    folder = tiny_checkpoint if kind == "checkpoint" else tiny_bundle
    program = f"""
from microvlm.backends.torch_eager import TorchBackend
TorchBackend().load({str(folder)!r})
dynamo = [name for name in sys.modules if name.startswith("torch._dynamo")]
assert not dynamo, dynamo
"""
    packages = loaded_after(program)
    assert "torch" in packages
    assert "sympy" not in packages


def test_an_empty_model_has_every_shape_and_dtype_and_no_memory() -> None:
    config = tiny_config()
    with empty_modules():
        empty = MicroVLM(config).state_dict()
    right = MicroVLM(config).state_dict()
    assert {name: (value.shape, value.dtype) for name, value in empty.items()} == {
        name: (value.shape, value.dtype) for name, value in right.items()
    }
    assert all(value.is_meta for value in empty.values())


def test_an_empty_model_takes_no_number_from_the_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with empty_modules():
        MicroVLM(tiny_config())
    assert torch.equal(torch.get_rng_state(), before)
