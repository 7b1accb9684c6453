"""The code that runs: the library's switches, what `ort` reports, and whole graphs with and without the library."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from microvlm.backends import get_backend, load, native
from microvlm.backends.ort import FUNCTION_BODIES, OrtRuntime
from microvlm.bench.provenance import kernels_of
from microvlm.errors import UserError
from microvlm.exporters import contract


def example_feeds(runtime: OrtRuntime, spec, seed: int) -> dict[str, np.ndarray]:
    """Random inputs of a graph of the contract: two rows, five tokens, three of the past."""
    rng = np.random.default_rng(seed)
    sizes = {contract.BATCH: 2, contract.SEQUENCE: 5, contract.PAST: 3, contract.TOTAL: 8}
    feeds = {}
    for value in runtime.session(spec.name).get_inputs():
        shape = [sizes[size] if isinstance(size, str) else size for size in value.shape]
        if value.name == "num_logits_to_keep":
            feeds[value.name] = np.asarray(2, np.int64)
        elif value.name == "input_ids":
            feeds[value.name] = rng.integers(0, runtime.config.text.vocab_size, shape)
        elif value.name == "position_ids":
            feeds[value.name] = np.broadcast_to(np.arange(4, 4 + shape[1]), shape).copy()
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones(shape, np.int64)
        else:
            feeds[value.name] = rng.normal(size=shape).astype(np.float32)
    return feeds


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("threads", [1, 3])
def test_every_graph_of_a_bundle_gives_the_same_bits_with_and_without_the_library(tiny_bundle, threads):
    fast = OrtRuntime(tiny_bundle, threads, native=True)
    plain = OrtRuntime(tiny_bundle, threads, native=False)
    assert fast.kernels == f"native {native.active_variant()}"
    assert plain.kernels == FUNCTION_BODIES
    for spec in contract.graphs(fast.config):
        feeds = example_feeds(fast, spec, seed=1)
        names = [tensor.name for tensor in spec.outputs]
        for name, value, expected in zip(
            names,
            fast.session(spec.name).run(names, feeds),
            plain.session(spec.name).run(names, feeds),
            strict=True,
        ):
            np.testing.assert_array_equal(
                value.view(np.int32), expected.view(np.int32), err_msg=f"{spec.name}: {name}"
            )


@pytest.mark.usefixtures("native_library")
def test_ort_uses_the_library_and_names_its_variant(tiny_bundle):
    runtime = load("ort", tiny_bundle)
    assert kernels_of(runtime) == f"native {native.active_variant()}"
    assert get_backend("ort").kernels() == runtime.kernels
    assert native.active_variant() == native.variants()[0]
    assert native.variants()[-1] == "reference"


def test_ort_runs_function_bodies_where_the_library_is_switched_off(tiny_bundle, monkeypatch):
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.library_path() is None
    assert kernels_of(load("ort", tiny_bundle)) == FUNCTION_BODIES
    with pytest.raises(UserError, match="no native library"):
        load("ort", tiny_bundle, native=True)
    with pytest.raises(UserError, match="no native library"):
        native.variants()


def test_a_missing_or_broken_library_is_refused_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv(native.SWITCH, str(tmp_path / "no.so"))
    with pytest.raises(UserError, match="neither 0 nor a library"):
        native.library_path()
    (tmp_path / "no.so").write_text("not a library")
    with pytest.raises(UserError, match="cannot be loaded"):
        native.variants()


def run_cli(*arguments: object) -> subprocess.CompletedProcess:
    program = [sys.executable, "-c", "from microvlm.commands.main import main; main()"]
    return subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.usefixtures("native_library")
def test_info_names_the_code_that_runs_or_why_none_can(tiny_bundle, monkeypatch):
    for variant in native.variants():
        monkeypatch.setenv("MICROVLM_KERNELS", variant)
        output = run_cli("info", tiny_bundle).stdout
        assert f"backend ort: runs its graphs, quantised layers by native {variant}" in output
    monkeypatch.setenv("MICROVLM_KERNELS", "abacus")
    output = run_cli("info", tiny_bundle).stdout
    assert "backend ort: cannot run here: MICROVLM_KERNELS=abacus is not a variant that runs here" in output
    assert ", ".join(native.variants()) in output
    monkeypatch.setenv(native.SWITCH, "0")
    assert f"quantised layers by {FUNCTION_BODIES}" in run_cli("info", tiny_bundle).stdout


@pytest.mark.usefixtures("native_library")
def test_an_unknown_variant_is_refused_in_one_sentence_with_status_2(speaking_bundle, monkeypatch, tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    monkeypatch.setenv("MICROVLM_KERNELS", "abacus")
    result = run_cli("caption", tmp_path / "red.png", "--model", speaking_bundle)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.strip().endswith(f"choose one of {', '.join(native.variants())}.")
    assert len(result.stderr.strip().splitlines()) == 1


def test_ort_runs_function_bodies_and_gives_the_reason_where_the_library_cannot_be_loaded(
    tiny_bundle, tmp_path, monkeypatch
):
    (tmp_path / native.LIBRARY).write_bytes(b"of another machine")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.delenv(native.SWITCH, raising=False)
    assert native.library_path() is None
    assert OrtRuntime(tiny_bundle).kernels.startswith(f"{FUNCTION_BODIES} (no native library: ")
    # MICROVLM_NATIVE=1 requires the library: no silent fallback.
    monkeypatch.setenv(native.SWITCH, "1")
    with pytest.raises(UserError, match="cannot be loaded"):
        native.active_variant()
