"""The plug-in of plugins/optimum in the real optimum: `optimum-cli export microvlm`, and TasksManager.

`pytest tests/elsewhere/optimum_plugin.py` where the plug-in is installed: `nox -s elsewhere`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import optimum.exporters.microvlm as plugin
import pytest
from click.testing import CliRunner
from optimum.exporters.tasks import TasksManager
from transformers import AutoConfig

from microvlm.config import MicroVLMConfig
from microvlm.exporters.contract import graphs
from microvlm.exporters.export_command import command
from microvlm.formats.bundle import open_bundle

PROGRAM = str(Path(sys.executable).parent / "optimum-cli")


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [PROGRAM, "export", "microvlm", *map(str, arguments)], capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("optimum") / "nano"
    process = run(
        "--model", "nano", "--bits", "8", "--embedding-bits", "4", "--vocabulary", "1500", "--json", folder
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["bits"] == 8
    return folder


def test_the_command_writes_the_bundle_of_our_own_command(bundle, tmp_path):
    own = tmp_path / "own"
    arguments = ["nano", "--bits", "8", "--embedding-bits", "4", "--vocabulary", "1500", "-o", str(own)]
    assert CliRunner().invoke(command, arguments, standalone_mode=False).exception is None
    theirs, ours = open_bundle(bundle, verify=True), open_bundle(own)
    assert theirs.fingerprint == ours.fingerprint
    assert {name: entry.sha256 for name, entry in theirs.files.items()} == {
        name: entry.sha256 for name, entry in ours.files.items()
    }


def test_the_help_has_our_options_and_their_words():
    process = run("--help")
    text = " ".join(process.stdout.split())
    assert process.returncode == 0
    for option in command.params:
        if option.name not in ("checkpoint", "output"):
            assert option.opts[-1] in text
            assert " ".join(option.help.split()[:3]) in text
    listing = subprocess.run([PROGRAM, "export", "--help"], capture_output=True, text=True).stdout
    assert "Export a MicroVLM checkpoint to a bundle of ONNX graphs." in listing


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-m", "no-such-model"), "no-such-model"),
        (("-m", "nano", "--bits", "3"), "--bits"),
        (("-m", "nano", "--bits", "-1"), "--bits"),
        (("-m", "nano", "--vocabulary", "many"), "many"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(arguments, words, tmp_path):
    process = run(*arguments, tmp_path / "bundle")
    assert process.returncode == 2
    assert words in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "bundle").exists()


def test_a_folder_that_is_there_is_not_replaced(bundle):
    before = (bundle / "manifest.json").stat().st_mtime_ns
    process = run("-m", "nano", bundle)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith(f"Error: {bundle} exists")
    assert (bundle / "manifest.json").stat().st_mtime_ns == before


def test_the_tasks_manager_knows_the_model_type_and_its_tensors(bundle):
    tasks = TasksManager.get_supported_tasks_for_model_type(
        "microvlm", "microvlm", library_name="transformers"
    )
    assert set(tasks) == set(plugin.TASKS)
    constructor = TasksManager.get_exporter_config_constructor(
        "microvlm", model_type="microvlm", task="image-text-to-text", library_name="transformers"
    )
    exporter = constructor(AutoConfig.from_pretrained(bundle))
    specs = graphs(MicroVLMConfig.load(bundle))
    assert set(exporter.inputs) == {tensor.name for graph in specs for tensor in graph.inputs}
    assert set(exporter.outputs) == {tensor.name for graph in specs for tensor in graph.outputs}
    assert exporter.inputs["pixel_values"] == {0: "batch"}
    assert exporter.inputs["past_key_values.0.key"] == {0: "batch", 2: "past"}


def test_the_registered_configuration_exports(bundle, tmp_path):
    exporter = plugin.MicroVLMExporterConfig(AutoConfig.from_pretrained(bundle), task="image-text-to-text")
    written = exporter.export("nano", tmp_path / "bundle", bits=8, embedding_bits=4, vocabulary=1500)
    assert open_bundle(written).fingerprint == open_bundle(bundle).fingerprint
