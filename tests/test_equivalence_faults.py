"""Graphs and kernels that are broken on purpose: the layer where the fault lies is named, and no tie is a fault."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from altered_bundles import altered, matmul_of, verdict_of
from click.testing import CliRunner
from onnx import helper, numpy_helper

from microvlm.backends import load, native
from microvlm.bench import report
from microvlm.bench.bench_command import command
from microvlm.bench.equivalence import matrix
from microvlm.bench.equivalence.metrics import Agreement
from microvlm.bench.equivalence.verdict import FAIL
from microvlm.exporters.replay.differences import Differences
from microvlm.exporters.replay.recording import Recorder, Recording, Replayer
from microvlm.formats.manifest import read_manifest
from microvlm.runtime import LayerCall

NATIVE = Path(__file__).parent.parent / "backends" / "native"


def layers_of(bundle: Path, graph: str) -> list[str]:
    """Names of the layers of a graph, in its order; a fused node has several."""
    model = onnx.load(str(bundle / "onnx" / f"{graph}.onnx"), load_external_data=False)
    operands = [name for node in model.graph.node for name in node.input]
    return [name.removesuffix(".packed") for name in operands if name.endswith(".packed")]


def scaled(layer: str, factor: float):
    """A change of a graph: the layer's scale times `factor`; a factor of -1 is a wrong sign."""

    def change(model: onnx.ModelProto) -> None:
        node = matmul_of(model, layer)
        at = list(model.graph.node).index(node)
        place = list(node.input).index(f"{layer}.scale")
        # No initializer: PyTorch, which reads those, would refuse the bundle.
        value = numpy_helper.from_array(np.float32([factor]))
        model.graph.node.insert(at, helper.make_node("Mul", [f"{layer}.scale", "factor"], ["wrong_scale"]))
        model.graph.node.insert(at, helper.make_node("Constant", [], ["factor"], value=value))
        node.input[place] = "wrong_scale"

    return change


@pytest.mark.parametrize("factor", [-1.0, 1.01, 0.99], ids=["wrong sign", "1 % more", "1 % less"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_wrong_sign_or_scale_of_one_layer_is_caught_with_its_name(
    speaking_bundle: Path, tmp_path: Path, factor: float, place: str
) -> None:
    layers = layers_of(speaking_bundle, "decoder_model_merged")
    layer = layers[{"first": 0, "middle": len(layers) // 2, "last": -2}[place]]
    bundle = altered(speaking_bundle, tmp_path, "decoder_model_merged", scaled(layer, factor))
    verdict, metrics = verdict_of(speaking_bundle, bundle, images=1)
    assert verdict == FAIL
    assert metrics.differences.first.layer == layer
    assert metrics.differences.first.what == "scale"
    assert metrics.differences.sums_differing == 0


def test_a_fault_between_two_layers_is_named_by_both(speaking_bundle: Path, tmp_path: Path) -> None:
    before, after = layers_of(speaking_bundle, "vision_encoder")[1:3]

    def negate(model: onnx.ModelProto) -> None:
        node = matmul_of(model, after)
        at = list(model.graph.node).index(node)
        model.graph.node.insert(at, helper.make_node("Neg", [node.input[0]], ["negated"]))
        node.input[0] = "negated"

    verdict, metrics = verdict_of(
        speaking_bundle, altered(speaking_bundle, tmp_path, "vision_encoder", negate), images=1
    )
    assert verdict == FAIL
    assert metrics.differences.first == (after, "input", before)
    assert metrics.differences.first.sentence == (
        f"the input of {after} is the first that differs, behind {before}"
    )


def test_an_unchanged_bundle_has_no_fault(speaking_bundle: Path) -> None:
    _, metrics = verdict_of(speaking_bundle, speaking_bundle)
    assert metrics.differences.first is None
    assert metrics.differences.scales_differing == 0
    assert metrics.differences.activations_off_ties == 0


@pytest.fixture(scope="module")
def overflowing_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native library with one lane of the int8 kernel in 16 bits: the sums of output 0 wrap round."""
    folder = tmp_path_factory.mktemp("overflow")
    shutil.copytree(NATIVE, folder / "source", ignore=shutil.ignore_patterns("*.so", "*.py", "__pycache__"))
    file = folder / "source" / "operators.cpp"
    code = file.read_text()
    assert code.count("return kernels.int8;") == 1
    code = code.replace("return kernels.int8;", "whole_lanes = kernels.int8;\n      return one_short_lane;")
    code = code.replace(
        "MatrixSums sums_of(",
        """MatrixSums whole_lanes;

void one_short_lane(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums,
                    uint8_t* scratch) {
  whole_lanes(tokens, matrix, begin, end, sums, scratch);
  if (begin > 0) return;
  for (int64_t m = 0; m < tokens.count; ++m) sums[m * matrix.rows] = static_cast<int16_t>(sums[m * matrix.rows]);
}

MatrixSums sums_of(""",
        1,
    )
    file.write_text(code)
    for arguments in (
        ["-S", folder / "source", "-B", folder],
        ["--build", folder, "--target", "microvlm_ops", "-j", "2"],
    ):
        process = subprocess.run(["cmake", *arguments], capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr
    return folder / native.LIBRARY


@pytest.mark.native
def test_one_overflowing_lane_is_caught_in_the_layer_where_it_first_overflows(
    speaking_bundle: Path, overflowing_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = load("torch", speaking_bundle, 1)
    kinds = {name: layer.kind for name, layer in read_manifest(speaking_bundle).lowered.items()}
    overflows: list[str] = []

    class Watch(Recorder):
        def observe(self, layer: str, call: LayerCall) -> None:
            if kinds.get(layer) == "int8" and np.abs(call.sums[..., 0]).max() > 32767:
                overflows.append(layer)

    pixels = 3 * np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    with reference.listening(Watch(Recording())):
        reference.encode_image(pixels)
    assert overflows, "no sum of this model is wide enough: the test shows nothing"
    monkeypatch.setenv(native.SWITCH, str(overflowing_library))
    candidate = load("ort", speaking_bundle, 1)
    recording, differences = Recording(), Differences()
    with reference.listening(Recorder(recording)):
        reference.encode_image(pixels)
    with candidate.listening(Replayer(recording, differences)):
        candidate.encode_image(pixels)
    assert differences.first.layer == overflows[0]
    assert differences.first.what == "sums"


def test_agreement_of_five_tokens_and_of_probabilities() -> None:
    agreement = Agreement()
    reference = np.log(np.float32([[0.5, 0.2, 0.1, 0.1, 0.05, 0.05], [0.3, 0.29, 0.2, 0.1, 0.1, 0.01]]))
    candidate = np.log(np.float32([[0.4, 0.3, 0.1, 0.1, 0.02, 0.08], [0.29, 0.3, 0.2, 0.1, 0.1, 0.01]]))
    agreement.add_logits(reference, candidate)
    assert agreement.top5_shared == [0.8, 1.0]
    assert agreement.top1_agreement == 0.5
    assert agreement.probability_change_rms == pytest.approx(np.sqrt((0.1**2 + 0.01**2) / 2), abs=1e-6)
    assert agreement.flipped_margins == pytest.approx([np.log(0.3 / 0.29)], abs=1e-5)


CRASHING = """
import os
from microvlm.backends import Backend

class Crashing(Backend):
    name = "crashing"
    def unavailable(self):
        return None
    def load(self, source, threads=None, **options):
        os.abort()
"""


def test_every_cell_of_a_matrix_has_a_verdict_and_a_crash_is_one(
    speaking_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layers_of(speaking_bundle, "decoder_model_merged")[1]
    # PyTorch reads the weights alone, so the graph is wrong and the reference is not.
    bundle = altered(speaking_bundle, tmp_path, "decoder_model_merged", scaled(layer, 1.01))
    info = tmp_path / "site" / "elsewhere-1.0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site" / "elsewhere_backends.py").write_text(CRASHING)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[microvlm.backends]\ncrashing = elsewhere_backends:Crashing\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=":")
    chosen = [matrix.Column("torch", "torch"), matrix._BODIES, matrix.Column("crashing", "crashing")]
    monkeypatch.setattr(matrix, "columns", lambda: chosen)
    result = CliRunner().invoke(
        command, ["equivalence", str(bundle), "--matrix", "--images", "1", "--json"], standalone_mode=False
    )
    assert result.return_value == 1, result.output
    document = json.loads(result.stdout)
    reference, bodies, crashed = document["cells"]
    assert (reference["verdict"], bodies["verdict"], crashed["verdict"]) == ("reference", FAIL, FAIL)
    assert bodies["starts_at"]["layer"] == layer
    assert layer in bodies["reasons"][0]
    assert {
        "kl_mean",
        "kl_p99",
        "kl_max",
        "top1_agreement",
        "top5_agreement",
        "probability_change_rms",
    } <= set(bodies)
    assert "was ended by signal 6" in crashed["reasons"][0]
    assert f"the scales of {layer} are the first that differ" in report.text(document)
