"""`microvlm-export`: its JSON, its sentences, its exit status, and what it leaves on disk."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import FLOAT, files_below, seeded_model, tiny_config

from microvlm.config import MemoryConfig, TextConfig, VisionConfig
from microvlm.console import run_click
from microvlm.exporters.export_command import command

SMALLEST = {
    "vision": VisionConfig(16, 8, 16, 1, 1, 16),
    "text": TextConfig(40, 32, 1, 1, 1, 32, 32, max_position_embeddings=64),
    "memory": MemoryConfig(slots=4, code_size=8, encoder_layers=1),
    "prefix_tokens": 2,
}


def export(arguments: list, capsys) -> tuple[int, str, str]:
    """Run the command in this process: status, stdout, stderr."""
    with pytest.raises(SystemExit) as exit_info:
        run_click(command, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit_info.value.code, captured.out, captured.err


def assert_one_sentence(result: tuple[int, str, str], words: str) -> None:
    status, stdout, stderr = result
    assert status == 2
    assert stdout == ""
    assert words in stderr
    assert stderr.startswith("Error: ")
    assert len(stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "2"], "--bits 2 is not offered"),
        (["--bits", "few"], "--bits few is not a number"),
        (["--bits", "nan"], "--bits nan is not offered"),
        (["--packing", "zip"], "--packing zip is not offered"),
        (["--embedding-bits", "2"], "--embedding-bits 2 is not offered"),
        (["--embedding-bits", "32"], "--embedding-bits 32 is not offered"),
        (["--embedding-bits", "x"], "--embedding-bits x is not offered"),
        (["--threads", "-1"], "--threads"),
        (["--threads", "two"], "two"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_a_bad_option_is_one_sentence(options, words, tiny_checkpoint, tmp_path, capsys):
    result = export([tiny_checkpoint, "-o", tmp_path / "bundle", *options], capsys)
    assert_one_sentence(result, words)
    assert os.listdir(tmp_path) == []


def test_a_bad_option_is_told_before_pytorch_is_imported():
    code = """
import sys
from microvlm.console import run_click
from microvlm.exporters.export_command import command
sys.modules["torch"] = None  # importing it is an error now
run_click(command, sys.argv[1:])
"""
    for flags, words in ((["--bits", "3"], "--bits 3"), (["--threads", "-1"], "--threads")):
        process = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
        assert_one_sentence((process.returncode, process.stdout, process.stderr), words)


def test_a_checkpoint_that_is_none_is_one_sentence(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert_one_sentence(export([tmp_path / "nowhere", "-o", tmp_path / "b"], capsys), "there is no model")
    assert_one_sentence(export([tmp_path / "empty", "-o", tmp_path / "b"], capsys), "neither a bundle")
    assert os.listdir(tmp_path) == ["empty"]


def test_a_folder_that_exists_is_refused_before_any_work(tiny_checkpoint, tiny_bundle, capsys):
    assert_one_sentence(export([tiny_checkpoint, "-o", tiny_bundle], capsys), "exists")


@pytest.mark.posix
@pytest.mark.export
def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(tiny_checkpoint, tmp_path, capsys):
    """A real refusal by the kernel while weights are written: no file may grow over 64 kB."""
    with files_below(1 << 16):
        result = export([tiny_checkpoint, "-o", tmp_path / "bundle"], capsys)
    assert_one_sentence(result, "the file is larger than")
    assert os.listdir(tmp_path) == []


@pytest.mark.export
def test_json_is_one_document_with_the_promised_keys(tmp_path, capsys):
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    seeded_model(tiny_config(**SMALLEST)).save_pretrained(checkpoint)
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "training.json").write_text('{"seed": 7}')
    options = ["--packing", "base3", "--embedding-bits", "4", "--threads", 1, "--json"]
    status, stdout, _ = export([checkpoint, "-o", bundle, *options], capsys)
    assert status == 0
    report = json.loads(stdout)
    assert set(report) == {
        "bundle", "bits", "packing", "total_bytes", "ternary_nodes", "bits_per_weight", "checks", "cuts", "notes",
        "products",
    }  # fmt: skip
    assert (report["bundle"], report["bits"], report["packing"]) == (str(bundle), 1.58, "base3")
    assert report["total_bytes"] == sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    assert report["ternary_nodes"] == 7 + 7 + 1
    assert set(report["bits_per_weight"]) == {"ternary", "embedding", "vision", "other"}
    assert all(
        check["passed"] and set(check) == {"graph", "output", "passed", "max_abs_diff"}
        for check in report["checks"]
    )
    assert (bundle / "tokenizer.json").read_text() == "{}"
    assert json.loads((bundle / "manifest.json").read_text())["training"] == {"seed": 7}


@pytest.mark.export
def test_a_graph_that_is_not_the_model_means_status_1_and_no_bundle(tmp_path, capsys):
    """A checkpoint with a NaN in it: nothing equals NaN, so no graph can be shown to be it."""
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    model = seeded_model(tiny_config(**SMALLEST))
    with torch.no_grad():
        model.decoder.norm.weight[0] = float("nan")
    model.save_pretrained(checkpoint)
    status, stdout, stderr = export([checkpoint, "-o", bundle, "--threads", 1], capsys)
    assert status == 1
    assert "✗ decoder_model_merged   logits" in stdout
    assert "✓ vision_encoder" in stdout
    assert "no bundle was kept" in stderr
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_what_is_exported_at_another_width_than_trained_is_said(tmp_path):
    from microvlm.exporters.bundle_writer import _remarks
    from microvlm.formats.weight_format import WeightFormat

    ternary, floating = seeded_model(tiny_config(**SMALLEST)), seeded_model(tiny_config(FLOAT, **SMALLEST))
    assert _remarks(ternary, WeightFormat()) == []
    assert "destroys it" in _remarks(floating, WeightFormat())[0]
    assert "trits are stored at 8 bits" in _remarks(ternary, WeightFormat(bits=8))[0]
    assert _remarks(floating, WeightFormat(bits=8)) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "training.json is not valid JSON: copy the checkpoint again, or remove the file."),
        ("[]", "training.json: the document must be an object, not a list"),
        ("null", "training.json: the document must be an object, not null"),
        ('{"loss": NaN}', "training.json is not valid JSON"),
        ('{"a": ' * 51 + "1" + "}" * 51, "training.json is nested too deeply"),
        ('{"a": ' * 100_000, "training.json is nested too deeply"),
        ('{"seed": ' + "9" * 5000 + "}", "integer value out of range"),
        ('{"a": "' + "x" * 4_000_000 + '"}', "training.json has more than 4,000,000 bytes"),
    ],
)
def test_a_record_of_training_that_is_none_is_told_before_anything_is_exported(
    text, sentence, tiny_checkpoint, tmp_path, capsys
):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    (checkpoint / "training.json").write_text(text)
    assert_one_sentence(export([checkpoint, "-o", tmp_path / "bundle"], capsys), sentence)
    assert not (tmp_path / "bundle").exists()
