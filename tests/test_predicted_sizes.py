"""`microvlm info` with flags of an export: the bundle that is then made has these files, to one part in a hundred."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import FLOAT, seeded_model, tiny_config

from microvlm.commands.info import info
from microvlm.console import run_click
from microvlm.exporters.bundle_writer import export
from microvlm.exporters.predicted.bundle_bytes import predict_bundle
from microvlm.exporters.predicted.memory_bytes import predict_memory
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.checkpoint import resolve_checkpoint
from microvlm.sizes.smaller import Smaller


def run_info(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_click(info, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit_info.value.code, captured.out, captured.err


OPENED = """
import sys
from pathlib import Path
import numpy, onnxruntime
import microvlm.inputs.tokenizer_tables
from microvlm.backends.ort import OrtRuntime
from microvlm.bench.provenance import memory_of_this_process
from microvlm.inputs.tokenizer import load_tokenizer
before = memory_of_this_process()["anonymous_bytes"]
runtime = OrtRuntime(Path(sys.argv[1]), 1)
tokenizer = load_tokenizer(Path(sys.argv[1]))
for graph in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
    runtime.session(graph)
print(memory_of_this_process()["anonymous_bytes"] - before)
"""


def assert_predicted(predicted, bundle):
    real = {
        path.relative_to(bundle).as_posix(): path.stat().st_size
        for path in bundle.rglob("*")
        if path.is_file()
    }
    assert predicted.files.keys() == real.keys()
    assert predicted.total_bytes == pytest.approx(sum(real.values()), rel=0.01)
    data = [name for name in real if name.endswith(".data")]
    for name in data:
        # Alignment may fall otherwise.
        assert predicted.files[name] == pytest.approx(real[name], abs=8192), name
    memory = predict_memory(predicted)
    assert memory.predicted_mapped_bytes == pytest.approx(sum(real[name] for name in data), rel=0.01)
    return memory.predicted_anonymous_bytes


def anonymous_bytes(bundle):
    """What opening a bundle's graphs and tokenizer takes, in a process of its own."""
    command = [sys.executable, "-c", OPENED, str(bundle)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.export
@pytest.mark.parametrize(
    ("weights", "smaller"),
    [
        (WeightFormat(), Smaller()),
        (WeightFormat(8, embedding_bits=4), Smaller(layers=3, slots=32, costs=False)),
        (WeightFormat(1.58, "base3", 16), Smaller(vocabulary=1200, costs=False)),
        (WeightFormat(32), Smaller(layers=1, vocabulary=900, costs=False)),
    ],
    ids=["1.58", "8-fewer", "base3-vocabulary", "32-one-layer"],
)
def test_a_bundle_of_nano_weighs_what_was_predicted(weights, smaller, tmp_path):
    predicted = predict_bundle(resolve_checkpoint("nano"), weights, smaller)
    export("nano", tmp_path / "b", weights, smaller=smaller, threads=1)
    anonymous = assert_predicted(predicted, tmp_path / "b")
    if sys.platform == "linux":
        # What else a process happens to keep only adds to it.
        least = min(anonymous_bytes(tmp_path / "b") for _ in range(3))
        assert anonymous == pytest.approx(least, rel=0.25)


@pytest.mark.export
@pytest.mark.parametrize("bits", [16, 4])
def test_a_float_model_of_another_shape_weighs_what_was_predicted(bits, tiny_processor, tmp_path):
    seeded_model(tiny_config(FLOAT)).save_pretrained(tmp_path / "c")
    tiny_processor.save(tmp_path / "c")
    weights = WeightFormat(bits)
    predicted = predict_bundle(tmp_path / "c", weights, Smaller())
    export(tmp_path / "c", tmp_path / "b", weights, threads=1)
    assert_predicted(predicted, tmp_path / "b")


def test_info_prints_what_an_export_would_make(capsys):
    flags = ["nano", "--bits", "8", "--layers", "2", "--slots", "20", "--vocabulary", "1000"]
    status, stdout, _ = run_info([*flags, "--json"], capsys)
    assert status == 0
    document = json.loads(stdout)
    assert (document["layers"], document["slots"], document["vocabulary"], document["bits"]) == (
        2,
        20,
        1000,
        8,
    )
    assert document["predicted_bundle_bytes"] == sum(document["predicted_file_bytes"].values())
    assert 0 < document["predicted_mapped_bytes"] < document["predicted_bundle_bytes"]
    assert document["predicted_anonymous_bytes"] > 0
    status, stdout, _ = run_info(flags, capsys)
    assert status == 0
    assert f"bundle{document['predicted_bundle_bytes'] / 1e6:>38.2f}" in stdout


def test_fewer_of_everything_weighs_less():
    folder = resolve_checkpoint("photo")
    whole = predict_bundle(folder, WeightFormat(), Smaller())
    for smaller in (Smaller(layers=3), Smaller(slots=64), Smaller(vocabulary=4000)):
        assert predict_bundle(folder, WeightFormat(), smaller).total_bytes < whole.total_bytes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nano", "--bits", "3"], "--bits 3 is not offered"),
        (["nano", "--embedding-bits", "32"], "--embedding-bits 32 is not offered"),
        (["nano", "--packing", "zip"], "--packing zip is not offered"),
        (["nano", "--layers", "0"], "--layers 0 leaves no decoder layers"),
        (["nano", "--layers", "5"], "--layers 5 is not fewer than the 4"),
        (["nano", "--slots", "64"], "--slots 64 is not fewer than the 64"),
        (["nano", "--vocabulary", "5"], "--vocabulary 5 is too few"),
        (["nano", "--corpus", "x.txt"], "say how many with --vocabulary"),
    ],
)
def test_what_cannot_be_exported_cannot_be_predicted(options, words, capsys):
    status, stdout, stderr = run_info(options, capsys)
    assert (status, stdout) == (2, "")
    assert words in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_a_bundle_is_no_checkpoint_to_predict_an_export_of(tiny_bundle, capsys):
    status, _, stderr = run_info([tiny_bundle, "--bits", "8"], capsys)
    assert status == 2
    assert "bundle" in stderr
