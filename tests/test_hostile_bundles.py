"""Bundles whose hashes are right and whose documents disagree: one sentence on every path, in little memory."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from microvlm.backends import load
from microvlm.commands.info import describe_model
from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.exporters import contract
from microvlm.formats.bundle import open_bundle

BACKENDS = ("ort", "torch")
USE = """
import resource, sys
import numpy, onnx, onnxruntime, safetensors.numpy, torch
import microvlm.model.torch_runtime
from microvlm.backends import load
from microvlm.commands.info import describe_model
from microvlm.errors import UserError
pages = int(open("/proc/self/statm").read().split()[0])
load(sys.argv[1], sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 400_000_000,) * 2)
for use in (lambda: load(sys.argv[1], sys.argv[2]).memory_prior(), lambda: describe_model(sys.argv[2])):
    try:
        use()
    except UserError as error:
        print(error)
"""


def rehash(folder: Path) -> None:
    """Make the manifest's sizes and hashes those of the files, as an attacker would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    path.write_text(json.dumps(manifest))


def change_config(part: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        (raw[part] if part else raw).update(values)
        (folder / "config.json").write_text(json.dumps(raw))

    return change


def change_manifest(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = json.loads((folder / "manifest.json").read_text())
        edit(raw)
        (folder / "manifest.json").write_text(json.dumps(raw))

    return change


def write_prior(shape: list[int], data_bytes: int, end: int | None = None) -> Callable[[Path], None]:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, data_bytes if end is None else end]}

    def change(folder: Path) -> None:
        header = json.dumps({"memory_prior": entry}).encode()
        content = len(header).to_bytes(8, "little") + header + bytes(data_bytes)
        (folder / "memory_prior.safetensors").write_bytes(content)

    return change


def pixels_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["graphs"]["vision_encoder"]["inputs"][0]


@pytest.fixture
def copy(speaking_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(speaking_bundle, tmp_path / "bundle"))


@pytest.mark.posix
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux's /proc says what is used")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (change_config("", prefix_tokens=1_000_000), "'prefix_tokens' must be a whole number <= 16384"),
        (
            change_config("", prefix_tokens=200),
            "and 'image_features float32 [batch, 200, 64]' by config.json",
        ),
        (change_config("vision", image_size=2048), "by config.json"),
        (change_config("text", vocab_size=10_000_000), "by config.json"),
        (change_config("text", num_hidden_layers=1024), "outputs by manifest.json and 2051 by config.json"),
        (change_config("memory", slots=200_000, code_size=262_144), "by config.json"),
        (write_prior([20_000, 3], 240_000), "memory_prior"),
        (write_prior([16, 48], 600, end=3072), "memory_prior.safetensors is damaged"),
    ],
    ids=["prefix", "prefix-within-limits", "image", "vocabulary", "layers", "slots", "prior", "prior-cut"],
)
def test_sizes_are_held_against_the_files_in_little_memory(change, sentence, backend, copy, speaking_bundle):
    change(copy)
    rehash(copy)
    command = [sys.executable, "-P", "-c", USE, backend, str(copy), str(speaking_bundle)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 2, "once for the backend, once for info"
    assert all(str(copy) in line and sentence in line for line in lines)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda raw: raw["graphs"].pop("memory_read"), "lacks the graph memory_read: copy"),
        (lambda raw: raw["graphs"]["embed_tokens"]["inputs"].clear(), "embed_tokens has 0 inputs by manifest.json"),
        (lambda raw: pixels_of(raw).update(dtype="int64"), "'pixel_values int64 [batch, 3, "),
        (lambda raw: pixels_of(raw).update(name="\x1b[1m"), r"'\x1b[1m float32 [batch, 3, "),
        (lambda raw: pixels_of(raw)["shape"].pop(), "by manifest.json and 'pixel_values float32 [batch, 3, "),
        (lambda raw: pixels_of(raw)["shape"].__setitem__(0, 7), "'pixel_values float32 [7, 3, "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("use", [*BACKENDS, "info"])
def test_graphs_that_are_not_the_configurations_are_told(edit, sentence, use, copy):
    change_manifest(edit)(copy)
    with pytest.raises(UserError) as caught:
        describe_model(copy) if use == "info" else load(use, copy)
    assert sentence in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_later_graph_and_other_names_of_free_dimensions_are_no_difference(copy):
    def edit(raw: dict[str, Any]) -> None:
        raw["graphs"]["later"] = {**raw["graphs"]["embed_tokens"], "name": "later"}
        pixels_of(raw)["shape"][0] = "rows"

    change_manifest(edit)(copy)
    contract.require_graphs(MicroVLMConfig.load(copy), open_bundle(copy).graphs, copy)


def test_what_a_graph_declares_is_held_against_the_manifest(copy):
    """A configuration and a manifest that agree on a larger picture than the graph takes."""
    change_config("vision", image_size=64)(copy)
    change_manifest(lambda raw: pixels_of(raw)["shape"].__setitem__(slice(2, 4), [64, 64]))(copy)
    rehash(copy)
    runtime = load("ort", copy)
    with pytest.raises(
        UserError, match=r"vision_encoder\.onnx does not have 'pixel_values' as manifest\.json"
    ):
        runtime.encode_image(np.zeros((1, 3, 64, 64), np.float32))
    with pytest.raises(UserError, match=r"'vision\.position_embeddings' is"):
        load("torch", copy)
    with pytest.raises(UserError, match=r"'vision\.position_embeddings' is"):
        describe_model(copy)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda raw: raw["lowered"].pop("scope.fc1"), "lacks 'scope.fc1.weight'"),
        (
            lambda raw: raw["lowered"]["scope.fc1"].update(rows=2**30, scale=2**30),
            "lists 'scope.fc1' as 1073741824 x ",
        ),
        (
            lambda raw: raw["lowered"].update({"forward": raw["lowered"]["scope.fc1"]}),
            "lists a layer 'forward'",
        ),
        (
            lambda raw: raw["lowered"]["scope.fc1"].update(kind="int9"),
            "'int9', which this version does not know",
        ),
    ],
)
def test_layers_that_are_not_the_models_are_told_where_they_are_built(change, sentence, copy):
    change_manifest(change)(copy)
    for use in (lambda: load("torch", copy), lambda: describe_model(copy)):
        with pytest.raises(UserError) as caught:
            use()
        assert sentence in str(caught.value)
    load("ort", copy)  # which builds no layers


def test_packed_bytes_that_are_none_are_told_on_torch(copy):
    path = copy / "onnx" / "decoder_model_merged.data"
    path.write_bytes(b"\xff" * path.stat().st_size)
    rehash(copy)
    with pytest.raises(UserError, match="has weights that its storage"):
        load("torch", copy)
