"""A backend of another package is measured and replayed like the built-in ones: docs/adding.md's, and one of its own
kind. Each is installed as a distribution with an entry point, and run by the commands that users type."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner

from microvlm.backends import load
from microvlm.bench.bench_command import command
from microvlm.runtime import Instrumented, OpensAhead, ReportsKernels, ReportsThreads

PAGE = Path(__file__).parent.parent / "docs" / "adding.md"

WRAPPED = '''
"""Runs the model by parts of torch, and inherits no class of the built-in runtimes. `LEVELS` 127 is right."""

from contextlib import contextmanager

import numpy as np
import torch

from microvlm.backends import Backend as Base
from microvlm.backends.torch_eager import TorchBackend
from microvlm.model.lowering import named_packed
from microvlm.runtime import LayerCall

LEVELS = {levels}
METHODS = (
    "encode_image embed_tokens decode empty_slot memory_prior memory_encode memory_write memory_forget memory_read"
).split()


class Backend(Base):
    name = "{name}"
    libraries = ("torch",)

    def unavailable(self):
        return None

    def load(self, source, threads=None, **options):
        return Runtime(TorchBackend().load(source, threads))


class Runtime:
    def __init__(self, inner):
        self.config, self.directory, self.fingerprint = inner.config, inner.directory, inner.fingerprint
        self._layers = named_packed(inner.model)
        for method in METHODS:
            setattr(self, method, getattr(inner, method))
        if LEVELS != 127:
            for layer in self._layers.values():
                layer.tap = self._limit
    {protocols}

    def _limit(self, own):
        return torch.clamp(own, -LEVELS, LEVELS)
'''

PROTOCOLS = """
    kernels = "torch by parts"

    def quantized_layers(self):
        return frozenset(self._layers)

    @contextmanager
    def listening(self, listener):
        taps = {name: layer.tap for name, layer in self._layers.items()}
        hooks = []
        for name, layer in self._layers.items():
            hooks += self._listen(name, layer, listener)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name, layer in self._layers.items():
                layer.tap, layer.sums_tap = taps[name], None

    def _listen(self, name, layer, listener):
        seen = {}

        def keep(module, inputs):
            seen["x"] = inputs[0].numpy()

        def choose(own):
            replacement = listener.replacement(name, seen["x"].shape)
            used = own if replacement is None else torch.from_numpy(replacement.astype(np.float32))
            seen["used"] = self._limit(used)
            return seen["used"]

        def observe(sums):
            listener.observe(name, LayerCall(seen["x"], seen["used"].numpy().astype(np.int8), sums.numpy()))

        layer.tap, layer.sums_tap = choose, observe
        return [layer.register_forward_pre_hook(keep)]
"""


def install(site: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, points: str, source: str):
    """A distribution as pip leaves it, on the path of this process and of the workers that it starts."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[microvlm.backends]\n{points}\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of docs/adding.md, from the page's blocks."""
    section = re.search(r"^## A backend\n(.*?)^## ", PAGE.read_text(), re.M | re.S).group(1)
    toml, source = (
        textwrap.dedent(re.search(rf"^   ```{language}\n(.*?)^   ```", section, re.M | re.S).group(1))
        for language in ("toml", "python")
    )
    points = re.sub(r'^\[.*\]\n|"', "", toml)
    install(tmp_path / "site", monkeypatch, "plain", "plain_backend", points, source)
    return "plain"


@pytest.fixture
def wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def wrap(name: str, levels: int = 127, protocols: str = PROTOCOLS) -> str:
        source = (
            WRAPPED.replace("{levels}", str(levels)).replace("{name}", name).replace("{protocols}", protocols)
        )
        module = f"{name}_backend"
        install(tmp_path / name, monkeypatch, name, module, f"{name} = {module}:Backend", source)
        return name

    return wrap


def bench(*arguments: str) -> tuple[int, dict]:
    result = CliRunner().invoke(command, [*arguments, "--json"], standalone_mode=False)
    assert result.exception is None, result.output
    return result.return_value, json.loads(result.stdout)


def equivalence(bundle: Path, *arguments: str) -> tuple[int, dict]:
    return bench(
        *("equivalence", str(bundle), "--images", "1", "--threads", "1", "--new-tokens", "2"), *arguments
    )


def assert_replayed(document: dict, operators: bool) -> None:
    """Everything was replayed, and nothing but rounding ties differs."""
    replay = document["replay"]
    assert document["integer_exact"] is True
    assert replay["sums"] > 100_000
    assert replay["codes"] > 100_000
    assert (replay["operator_outputs"] > 100_000) == operators
    assert replay["operator_mismatches"] == 0
    assert replay["greedy_match"] == 1.0
    assert replay["logits_max_abs_diff"] <= 1e-4


def test_the_backend_of_the_page_implements_the_protocols_it_shows(plain: str, speaking_bundle: Path) -> None:
    runtime = load(plain, speaking_bundle)
    for protocol in (Instrumented, ReportsKernels, ReportsThreads, OpensAhead):
        assert isinstance(runtime, protocol), protocol
    assert runtime.quantized_layers() == load("torch", speaking_bundle).quantized_layers()


@pytest.mark.linux
@pytest.mark.pages
def test_the_backend_of_the_page_is_measured_and_replayed(plain: str, speaking_bundle: Path) -> None:
    status, document = bench(
        *("run", str(speaking_bundle), "--backend", plain, "--repeats", "1", "--warmup", "0"),
        *("--new-tokens", "2"),
    )
    (entry,) = document["results"]
    assert status == 0, entry
    assert entry["path"] == "function bodies, not optimised"
    assert entry["phases"]["load"]["median_ms"] > 0
    assert entry["peak_rss_bytes"] > 0
    _, document = equivalence(speaking_bundle, "--candidate", plain)
    assert document["candidate"]["kernels"] == "function bodies, not optimised"
    assert_replayed(document, operators=True)


def test_a_runtime_of_its_own_kind_is_measured_recorded_and_replayed(wrapped, speaking_bundle: Path) -> None:
    name = wrapped("acme")
    status, document = bench(
        *("run", str(speaking_bundle), "--backend", name, "--repeats", "1", "--warmup", "0"),
        *("--new-tokens", "2"),
    )
    (entry,) = document["results"]
    assert status == 0, entry
    assert entry["path"] == "torch by parts"
    _, document = equivalence(speaking_bundle, "--reference", "ort", "--candidate", name)
    assert_replayed(document, operators=False)
    _, document = equivalence(speaking_bundle, "--reference", name, "--candidate", "ort")
    assert_replayed(document, operators=True)


def test_a_third_party_backend_that_computes_another_sum_fails_by_its_sums(
    wrapped, speaking_bundle: Path
) -> None:
    status, document = equivalence(
        speaking_bundle, "--reference", "ort", "--candidate", wrapped("narrow", levels=126)
    )
    assert status == 1
    assert document["verdict"] == "FAIL"
    assert document["replay"]["sums_differing"] > 0


def test_a_backend_without_protocols_is_compared_and_the_report_says_why_nothing_is_replayed(
    wrapped, speaking_bundle: Path
) -> None:
    name = wrapped("bare", protocols="")
    _, document = equivalence(speaking_bundle, "--candidate", name, "--reference", "ort")
    assert document["candidate"]["kernels"] == "the backend's own"
    assert document["samples"] > 0
    assert document["replay"]["unavailable"] == (
        "backend 'bare': its layers cannot be opened, so nothing can be replayed"
    )
