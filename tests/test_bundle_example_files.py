"""A bundle's example.py loses no fact, whoever writes beside it, and refuses damaged files in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_images import write_huge_png

from microvlm.exporters.elsewhere.example import Bundle, Refusal
from microvlm.formats.manifest import MANIFEST, sha256

pytestmark = pytest.mark.posix


@pytest.fixture(scope="module")
def bundle(speaking_bundle, tmp_path_factory) -> Path:
    """A copy of a bundle. Tests put back what they damage."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    shutil.copytree(speaking_bundle, folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder that the program runs in, with a picture."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return tmp_path


def run(bundle: Path, folder: Path, *arguments: object, **options) -> subprocess.CompletedProcess:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120, **options}
    command = [sys.executable, "-P", str(bundle / "example.py"), *map(os.fsencode, map(str, arguments))]
    return subprocess.run(command, cwd=folder, check=False, **options)


def refused(process: subprocess.CompletedProcess) -> str:
    """The one line on stderr of a program that refused, with status 2."""
    error = process.stderr.decode()
    assert process.returncode == 2, error
    assert error.count("\n") == 1, error
    assert error.startswith("example.py: ")
    return error


def stored(folder: Path) -> list[str]:
    with np.load(folder / "facts.npz") as facts:
        return sorted(name for name in facts if name.startswith("key "))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_eight_at_once_keep_eight_facts(bundle, folder):
    command = [sys.executable, "-P", str(bundle / "example.py"), "tell", "red.png"]
    processes = [subprocess.Popen([*command, f"who {n}?", f"name {n}"], cwd=folder) for n in range(8)]
    assert [process.wait(timeout=300) for process in processes] == [0] * 8
    assert len(stored(folder)) == 8
    assert hidden(folder) == []


def test_a_killed_writer_leaves_the_old_facts_and_nothing_that_stops_the_next(bundle, folder):
    assert run(bundle, folder, "tell", "red.png", "whose?", "anna").returncode == 0
    before = (folder / "facts.npz").read_bytes()
    stop = (
        "import os, runpy, sys\n"
        "def stop(*names): print(flush=True); __import__('time').sleep(60)\n"
        "os.replace = stop\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-P", "-c", stop, bundle / "example.py", "tell", "red.png", "where?", "here"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE)
    process.stdout.readline()
    assert hidden(folder) == [".facts.npz", ".facts.npz.lock"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "facts.npz").read_bytes() == before
    began = time.monotonic()
    assert run(bundle, folder, "tell", "red.png", "where?", "here").returncode == 0
    assert time.monotonic() - began < 60
    assert len(stored(folder)) == 2
    assert hidden(folder) == []


def test_a_lock_file_is_no_way_to_another_file(bundle, folder):
    precious = folder / "precious"
    precious.write_text("mine")
    lock = folder / ".facts.npz.lock"
    for link in (lock.symlink_to, lock.hardlink_to):
        link(precious)
        refused(run(bundle, folder, "tell", "red.png", "whose?", "anna"))
        lock.unlink()
    (folder / ".facts.npz").symlink_to(precious)
    assert run(bundle, folder, "tell", "red.png", "whose?", "anna").returncode == 0
    assert precious.read_text() == "mine"
    assert len(stored(folder)) == 1


def test_a_linked_file_of_facts_stays_a_link_and_keeps_its_permissions(bundle, folder):
    (folder / "far").mkdir()
    (folder / "facts.npz").symlink_to("far/facts.npz")
    assert run(bundle, folder, "tell", "red.png", "whose?", "anna").returncode == 0
    (folder / "far" / "facts.npz").chmod(0o600)
    assert run(bundle, folder, "tell", "red.png", "where?", "here").returncode == 0
    assert (folder / "facts.npz").is_symlink()
    assert (folder / "far" / "facts.npz").stat().st_mode & 0o777 == 0o600
    assert len(stored(folder)) == 2
    assert hidden(folder / "far") == []


def damaged_facts(path: Path) -> dict[str, bytes]:
    """Kind -> content of a damaged facts.npz, made of a good one."""
    good = path.read_bytes()
    with np.load(path) as saved:
        arrays = dict(saved)

    def changed(**changes: np.ndarray) -> bytes:
        with open(path.with_name("made.npz"), "wb") as file:
            np.savez(file, **{**arrays, **changes})
        return path.with_name("made.npz").read_bytes()

    bomb = path.with_name("bomb.npz")
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("mean.npy", "w") as member:
        member.write(b"\x93NUMPY\x01\0v\0")
        for _ in range(200):
            member.write(bytes(1_000_000))
    nan = arrays["mean"].copy()
    nan[0, 0, 0] = np.nan
    without_mean = {name: value for name, value in arrays.items() if name != "mean"}
    with open(path.with_name("less.npz"), "wb") as file:
        np.savez(file, **without_mean)
    return {
        "empty": b"",
        "text": b"I am no archive.\n" * 9,
        "cut": good[: len(good) // 2],
        "flipped": good[:3000] + bytes([good[3000] ^ 1]) + good[3001:],
        "bomb": bomb.read_bytes(),
        "pickle": changed(mean=np.array([{"a": 1}], dtype=object)),
        "nan": changed(mean=nan),
        "float64": changed(mean=arrays["mean"].astype(np.float64)),
        "shape": changed(mean=arrays["mean"][:, :-1]),
        "wide": changed(covariance=np.zeros((1, 64, 64), np.float32)),
        "another model": changed(fingerprint=np.array("0" * 64)),
        "newer": changed(format=np.array(2)),
        "unknown array": changed(other=np.zeros(3)),
        "half a fact": changed(**{"key x": arrays["mean"][:, :, 0].copy()}),
        "no mean": path.with_name("less.npz").read_bytes(),
    }


def test_damaged_facts_are_refused_and_stay_as_they_are(bundle, folder):
    path = folder / "facts.npz"
    assert run(bundle, folder, "tell", "red.png", "whose?", "anna").returncode == 0
    words = {"another model": "another model", "newer": "newer", "bomb": "memory"}
    model = Bundle(bundle)
    for kind, content in damaged_facts(path).items():
        path.write_bytes(content)
        with pytest.raises(Refusal, match=rf"facts\.npz.*{words.get(kind, '')}") as refusal:
            model.read_facts(path)
        assert "\n" not in str(refusal.value)
        if kind in words:
            for arguments in (("tell", "red.png", "where?", "here"), ("forget", "red.png", "whose?")):
                assert words[kind] in refused(run(bundle, folder, *arguments))
        assert path.read_bytes() == content
    path.unlink()
    for special in (os.mkfifo, os.mkdir):
        special(path)
        assert "facts.npz" in refused(run(bundle, folder, "ask", "red.png"))
        path.rmdir() if path.is_dir() else path.unlink()
    assert hidden(folder) == []


def test_facts_of_older_bundles_are_read(bundle, folder):
    """They had neither a format nor a fingerprint."""
    assert run(bundle, folder, "tell", "red.png", "whose?", "anna").returncode == 0
    with np.load(folder / "facts.npz") as saved:
        old = {name: value for name, value in saved.items() if name not in ("format", "fingerprint")}
    np.savez(folder / "facts.npz", **old)
    assert b"scope" in run(bundle, folder, "ask", "red.png", "whose?").stdout


def tell(bundle: Path, folder: Path) -> None:
    """Compute what the program's `tell` does."""
    model = Bundle(bundle)
    row = model.row("whose?", folder / "red.png", "anna")
    model.run("memory_write", *row, *model.empty_memory())


@pytest.mark.parametrize(
    "name",
    [
        MANIFEST,
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "preprocessor_config.json",
        "memory_prior.safetensors",
        "onnx/vision_encoder.onnx",
        "onnx/memory_write.onnx",
    ],
)
def test_a_damaged_file_of_the_bundle_is_refused(name, bundle, folder):
    path, manifest = bundle / name, bundle / MANIFEST
    good, listed = path.read_bytes(), manifest.read_text()
    contents = [b"", good[: len(good) // 2], b"\xff" * 99, b"[" * 100_000, b"null", b"{}"]
    if name == MANIFEST:
        document = json.loads(listed)
        contents += [
            json.dumps({**document, **change}).encode()
            for change in (
                {"format": 3},
                {"format": "2"},
                {"files": None},
                {"files": {"../x": {"bytes": 1, "sha256": ""}}},
                {"files": {}},
                {"graphs": {"vision_encoder": {}}},
            )
        ]
    defaults = (b"{}",) if name in ("generation_config.json", "preprocessor_config.json") else ()
    try:
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(Refusal, match=Path(name).name) as refusal:
                tell(bundle, folder)
            assert "\n" not in str(refusal.value)
            if name != MANIFEST and content not in defaults:
                document = json.loads(listed)
                document["files"][name] = {"bytes": len(content), "sha256": sha256(path)}
                manifest.write_text(json.dumps(document))
                with pytest.raises(Refusal) as refusal:
                    tell(bundle, folder)
                assert "\n" not in str(refusal.value)
                manifest.write_text(listed)
        assert Path(name).name in refused(run(bundle, folder, "ask", "red.png"))
        path.unlink()
        assert Path(name).name in refused(run(bundle, folder, "ask", "red.png"))
    finally:
        path.write_bytes(good)
        manifest.write_text(listed)
    assert sorted(each.name for each in folder.iterdir()) == ["red.png"]


def test_sizes_of_a_config_take_no_memory(bundle, folder):
    """They are right by their hash and wrong for the graphs, whose sizes count."""
    path, manifest = bundle / "config.json", bundle / MANIFEST
    good, listed = path.read_text(), manifest.read_text()
    document = json.loads(good)
    document["vision"]["image_size"] = 120_000
    document["text"] |= {"num_hidden_layers": 2 * 10**9, "num_key_value_heads": 10**9}
    document["memory"] |= {"slots": 10**6, "code_size": 10**7}
    document["prefix_tokens"] = 2 * 10**9
    try:
        path.write_text(json.dumps(document))
        changed = json.loads(listed)
        changed["files"]["config.json"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        manifest.write_text(json.dumps(changed))
        process = run(bundle, folder, "ask", "red.png", timeout=60)
    finally:
        path.write_text(good)
        manifest.write_text(listed)
    assert process.returncode == 0
    assert process.stdout == run(bundle, folder, "ask", "red.png").stdout


def test_outputs_and_names_that_cannot_be_encoded_are_escaped(bundle, folder):
    name = os.fsdecode(b"caf\xe9-\xff.png")
    shutil.copy(folder / "red.png", folder / name)
    for encoding in ("cp1252", "utf-8:strict"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        assert run(bundle, folder, "ask", name, env=environment).returncode == 0
        refused_process = run(bundle, folder, "ask", name, "\u732b <image>\ufffd", env=environment)
        assert b"leave '<image>' out" in refused_process.stderr
        missing = run(bundle, folder, "ask", os.fsdecode(b"\xff\xe7\x8c\xab"), env=environment)
        assert missing.returncode == 2
        assert b"Traceback" not in missing.stderr
        assert b"No such file" in missing.stderr
        assert run(bundle, folder, "tell", name, "whose \u732b?", "\u732b", env=environment).returncode == 0
        assert len(stored(folder)) == 1
        assert run(bundle, folder, "forget", name, "whose \u732b?", env=environment).returncode == 0


@pytest.mark.linux
def test_a_closed_or_full_output_is_no_traceback(bundle, folder):
    with open("/dev/full", "wb") as full:
        process = run(bundle, folder, "ask", "red.png", stdout=full)
    assert process.returncode == 2
    assert b"Traceback" not in process.stderr
    shell = f"{sys.executable} -P {bundle}/example.py ask red.png >&-"
    closed = subprocess.run(shell, shell=True, cwd=folder, capture_output=True, timeout=120, check=False)
    assert b"Traceback" not in closed.stderr


def test_a_huge_picture_is_refused_before_it_is_decoded(bundle, folder):
    write_huge_png(folder / "huge.png", 6000)
    assert "scale it down" in refused(run(bundle, folder, "ask", "huge.png"))
    write_huge_png(folder / "huger.png", 20_000)
    refused(run(bundle, folder, "ask", "huger.png"))
