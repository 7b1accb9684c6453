"""Backends by name: ours, a third party's, a broken one, and what runs without torch."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from microvlm.backends import backend_names, get_backend, load, resolve_bundle
from microvlm.errors import UserError

BLOCK_TORCH = """
import importlib.abc, importlib.util, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "onnx", "onnxscript", "onnx_ir"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocker())
find_spec = importlib.util.find_spec
def found(name, package=None):
    try:
        return find_spec(name, package)
    except ModuleNotFoundError:
        return None
importlib.util.find_spec = found
"""


def run_without_torch(program: str, *arguments: str, **keywords) -> subprocess.CompletedProcess:
    code = BLOCK_TORCH + textwrap.dedent(program)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, **keywords
    )


def install(folder, name: str, module: str, source: str) -> None:
    """A distribution as pip leaves it: a module and a dist-info with an entry point."""
    (folder / f"{module}.py").write_text(textwrap.dedent(source))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[microvlm.backends]\n{name} = {module}:Backend\n")


def test_our_backends_are_registered_and_run_here():
    assert {"ort", "ort-arm64", "torch"} <= set(backend_names())
    assert get_backend("ort").runs_here
    assert not get_backend("ort-arm64").runs_here
    assert get_backend("ort").unavailable() is None
    assert get_backend("torch").unavailable() is None


def test_an_unknown_backend_lists_the_names():
    with pytest.raises(UserError, match=r"unknown backend 'tpu'; choose one of .*ort.*torch"):
        get_backend("tpu")


def test_a_third_party_backend_is_found_by_its_entry_point(tmp_path, monkeypatch, speaking_checkpoint):
    install(
        tmp_path,
        "acme",
        "acme_backend",
        """
        from microvlm.backends import Backend as Base, get_backend
        class Backend(Base):
            name = "acme"
            def unavailable(self):
                return None
            def load(self, source, threads=None, **options):
                return get_backend("torch").load(source, threads, **options)
        """,
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "acme" in backend_names()
    runtime = load("acme", speaking_checkpoint)
    assert runtime.embed_tokens(np.array([[1, 2]])).shape == (1, 2, 64)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import a_module_that_is_not_there", "cannot be imported"),
        ("class Backend: pass", "is not a microvlm.backends.Backend"),
    ],
)
def test_a_broken_third_party_backend_is_one_sentence_and_hurts_no_other(
    source, sentence, tmp_path, monkeypatch
):
    install(tmp_path, "broken", "broken_backend", source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken_backend", raising=False)
    with pytest.raises(UserError, match=sentence):
        get_backend("broken")
    assert get_backend("ort").unavailable() is None


@pytest.mark.parametrize("name", ["ort", "torch"])
def test_an_unknown_option_and_bad_threads_are_refused(name, speaking_checkpoint):
    with pytest.raises(UserError, match="no option 'turbo'"):
        load(name, speaking_checkpoint, turbo=True)
    with pytest.raises(UserError, match="--threads is 0"):
        load(name, speaking_checkpoint, threads=0)


def test_everything_for_a_device_imports_without_torch_transformers_and_onnx():
    program = """
    import importlib
    for name in (
        "config generation sampling runtime state_choice formats.packing formats.op_table formats.onnx_weights "
        "inputs.processor inputs.images memory.conversation memory.facts memory.memory_file "
        "commands.main loaded_model exporters.contract serve.server serve.worker.process serve.worker.tasks "
        "backends backends.base backends.ort backends.torch_eager backends.resolve backends.arm64 "
        "backends.arm64.device_runtime backends.arm64.device.graph_server "
        "backends.arm64.transports.ssh backends.arm64.transports.emulated"
    ).split():
        importlib.import_module("microvlm." + name)
    assert "torch" not in sys.modules and "onnx" not in sys.modules
    """
    process = run_without_torch(program)
    assert process.returncode == 0, process.stderr


def test_a_bundle_captions_and_chats_without_torch(speaking_bundle, tmp_path):
    from PIL import Image

    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    program = """
    from microvlm.commands.main import cli
    from microvlm.console import run_click
    run_click(cli, sys.argv[1:])
    """
    model = ("--model", str(speaking_bundle), "--max-new-tokens", "3")
    captioned = run_without_torch(program, "caption", str(tmp_path / "red.png"), *model)
    assert captioned.returncode == 0, captioned.stderr
    lines = f"/image {tmp_path / 'red.png'}\nwhat is this?\n/memory\n"
    chatted = run_without_torch(program, "chat", *model, input=lines)
    assert chatted.returncode == 0, chatted.stderr
    assert "entries in a memory of 16 slots" in chatted.stdout
    process = run_without_torch(
        program, "caption", str(tmp_path / "red.png"), "--backend", "ort", "--model", "nano"
    )
    assert process.returncode == 2
    assert "microvlm-export where torch is installed" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_checkpoint_is_exported_once(speaking_checkpoint, speaking_bundle, monkeypatch, capsys):
    cache = speaking_bundle.parent.parent
    monkeypatch.setenv("MICROVLM_CACHE", str(cache))
    stamp = (speaking_bundle / "manifest.json").stat().st_mtime_ns
    assert resolve_bundle(speaking_checkpoint) == speaking_bundle
    assert resolve_bundle(speaking_bundle) == speaking_bundle
    assert (speaking_bundle / "manifest.json").stat().st_mtime_ns == stamp
    assert "exporting" not in capsys.readouterr().err


def test_what_is_neither_bundle_nor_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a bundle"):
        resolve_bundle(tmp_path)
    with pytest.raises(UserError, match="there is no model"):
        resolve_bundle(str(tmp_path / "none"))
