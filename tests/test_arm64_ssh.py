"""The ssh target against a real sshd on loopback: what is copied, what is printed, and connections that break."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ssh_server import SSHD, SshServer, serving, session_of, user_name

from microvlm.backends import load
from microvlm.backends.arm64 import worker_link
from microvlm.backends.arm64.transports import ssh
from microvlm.backends.arm64.transports.device_package import package_for
from microvlm.backends.arm64.transports.worker_process import WorkerProcess
from microvlm.commands.main import cli
from microvlm.console import run_click
from microvlm.errors import UserError
from microvlm.formats.bundle import open_bundle
from microvlm.generation import GenerationOptions, embed_prompt, generate

OPTIONS = GenerationOptions(max_new_tokens=12)
LONG = GenerationOptions(max_new_tokens=200)
"""Long enough that most of it is still to come when the first token is there."""

pytestmark = [
    pytest.mark.ssh,
    pytest.mark.skipif(
        not Path(SSHD).exists() or shutil.which("ssh") is None,
        reason="needs openssh-server and openssh-client",
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with serving(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture(autouse=True)
def environment(server: SshServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(worker_link, "DELAYS_S", (0, 0.1, 0.1))
    # A small pipe of some fifty tokens: when a client is killed, most of an answer is still to come.
    monkeypatch.setattr(ssh, "WorkerProcess", functools.partial(WorkerProcess, pipesize=4096))


@pytest.fixture(scope="module")
def ort(speaking_bundle: Path):
    return load("ort", speaking_bundle, threads=1)


@pytest.fixture(scope="module")
def prompt(ort):
    ids = np.random.default_rng(0).integers(4, 290, (1, 9))
    return embed_prompt(ort, ids, np.ones((1, 9), np.int64), None, 3)


@pytest.fixture
def run(capsys: pytest.CaptureFixture):
    """Arguments -> (status, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            run_click(cli, arguments)
        out, err = capsys.readouterr()
        return exit_info.value.code, out, err

    return call


def open_remote(server: SshServer, bundle: Path):
    return load("ort-arm64", bundle, threads=1, target=server.target)


def test_a_caption_over_ssh_equals_that_of_ort_and_nothing_is_copied_twice(
    server: SshServer, speaking_bundle: Path, run, tmp_path: Path
) -> None:
    picture = str(tmp_path / "red.png")
    Image.new("RGB", (30, 30), "red").save(picture)
    command = ("caption", picture, "--model", str(speaking_bundle), "--json", "--max-new-tokens", "9")
    _, expected, _ = run(*command, "--backend", "ort")
    first = run(*command, "--backend", "ort-arm64", "--target", server.target)
    again = run(*command, "--target", server.target)
    for status, out, _ in (first, again):
        assert status == 0
        assert json.loads(out)["tokens"] == json.loads(expected)["tokens"]
    assert "copying microvlm to" in first[2]
    assert f"copying {speaking_bundle.name} to" in first[2]
    assert again[2] == ""
    bundle_copy = next(path.parent for path in server.cache.glob("bundles/*/manifest.json"))
    open_bundle(bundle_copy, verify=True)
    assert list(server.cache.glob("wheels/*")) == []
    # The worker ran from what was copied and not from what is installed here.
    assert {path.name for path in server.cache.glob("packages/*/*")} == {"microvlm", ".whole"}


def test_chat_and_memory_commands_work_over_ssh_and_read_the_files_of_ort(
    server: SshServer, speaking_bundle: Path, run, tmp_path: Path
) -> None:
    model = ("--model", str(speaking_bundle))
    file = str(tmp_path / "facts.mem")
    fact = ("--question", "what is this?", "--text", "a red heart")
    open_remote(server, speaking_bundle)  # so that the next command copies nothing
    status, _, err = run("memory", "write", file, *fact, *model, "--target", server.target)
    assert (status, err) == (0, "")
    host_result = run(
        "memory", "read", file, "--question", "what is this?", "--json", *model, "--backend", "ort"
    )
    device_result = run(
        "memory", "read", file, "--question", "what is this?", "--json", *model, "--target", server.target
    )
    first, second = json.loads(host_result[1]), json.loads(device_result[1])
    assert first["tokens"] == second["tokens"]
    assert first["scope"] == second["scope"]


def test_info_describes_the_device(server: SshServer, speaking_bundle: Path, run) -> None:
    status, out, _ = run("info", str(speaking_bundle), "--target", server.target, "--json")
    runtime_facts = json.loads(out)["loaded"]
    assert status == 0
    assert runtime_facts["target"] == server.target
    assert runtime_facts["device"]["machine"] == os.uname().machine
    assert runtime_facts["device"]["features"]
    assert os.uname().machine in runtime_facts["kernels"]
    status, out, _ = run("info", str(speaking_bundle), "--target", server.target)
    assert status == 0
    assert "features: " in out


@pytest.mark.parametrize("victim", ["the ssh client", "the session's sshd"])
def test_a_connection_that_drops_in_the_middle_of_an_answer_comes_back(
    victim: str, server: SshServer, speaking_bundle: Path, ort, prompt, capfd: pytest.CaptureFixture
) -> None:
    remote = open_remote(server, speaking_bundle)
    session = session_of(remote.condition()["pid"])
    tokens: list[int] = []

    def on_token(_: int, token: int) -> None:
        tokens.append(token)
        if len(tokens) == 1:
            os.kill(remote.pid if victim == "the ssh client" else session, signal.SIGKILL)

    state = remote.memory_write(*_row(ort, prompt), remote.memory_prior())
    result = generate(remote, prompt, LONG, state, on_token)
    expected = generate(ort, prompt, LONG, ort.memory_write(*_row(ort, prompt), ort.memory_prior()))
    assert result.tokens == expected.tokens
    assert tokens == result.tokens[0]
    stderr = capfd.readouterr().err
    assert f"{server.target} was lost; connecting again" in stderr
    assert f"{server.target} is back" in stderr


def test_a_cache_is_restored_after_a_connection_dropped_between_two_steps(
    server: SshServer, speaking_bundle: Path, ort, prompt
) -> None:
    remote = open_remote(server, speaking_bundle)
    rows = {}
    for runtime in (ort, remote):
        mask = np.array([[0] + [1] * 9])
        logits, past = runtime.decode(
            prompt.inputs_embeds, mask, np.arange(1, 10)[None], runtime.empty_slot(1)
        )
        for step in range(4):
            if runtime is remote and step == 2:
                os.kill(session_of(remote.condition()["pid"]), signal.SIGKILL)
            mask = np.concatenate([mask, [[1]]], 1)
            embeds = runtime.embed_tokens(np.array([[50 + step]]))
            logits, past = runtime.decode(embeds, mask, np.array([[10 + step]]), past)
        rows[runtime] = logits
    assert np.array_equal(rows[ort], rows[remote])


def _row(runtime, prompt) -> tuple[np.ndarray, np.ndarray]:
    latent, key = runtime.memory_encode(*prompt)
    return key, latent


@pytest.fixture
def fresh_cache(server: SshServer) -> Path:
    shutil.rmtree(server.cache, ignore_errors=True)
    return server.cache


def test_an_interrupted_copy_continues_and_a_damaged_one_is_noticed(
    server: SshServer, speaking_bundle: Path, ort, fresh_cache: Path
) -> None:
    open_remote(server, speaking_bundle)
    folder = next(path.parent for path in fresh_cache.glob("bundles/*/manifest.json"))
    data_files = {path.name: path for path in (folder / "onnx").glob("*.data")}
    cut_file, damaged_file = data_files["embedding.data"], data_files["decoder_model_merged.data"]
    content = cut_file.read_bytes()
    cut_file.with_name(f".{cut_file.name}.part").write_bytes(content[: len(content) // 2])
    damaged_file.with_name(f".{damaged_file.name}.part").write_bytes(b"\xff" * 100)
    cut_file.unlink()
    damaged_file.unlink()
    with pytest.raises(UserError, match="the file's hash changed on the way"):
        open_remote(server, speaking_bundle)
    runtime = open_remote(server, speaking_bundle)
    open_bundle(folder, verify=True)
    ids = np.array([[5, 60, 7]])
    assert np.array_equal(runtime.embed_tokens(ids), ort.embed_tokens(ids))


@pytest.mark.parametrize(
    ("file", "description"),
    [
        ("bundles/*/onnx/embedding.data", "the bundle"),
        ("bundles/*/manifest.json", "the bundle"),
        ("packages/*/microvlm/errors.py", "microvlm"),
        ("packages/*/microvlm/backends/arm64/device/graph_server.py", "microvlm"),
    ],
)
def test_a_copy_whose_bytes_a_power_cut_zeroed_is_sent_again(
    file: str, description: str, server: SshServer, speaking_bundle: Path, ort, capfd: pytest.CaptureFixture
) -> None:
    open_remote(server, speaking_bundle)
    damaged_file = next(server.cache.glob(file))
    content = damaged_file.read_bytes()
    damaged_file.write_bytes(bytes(len(content)))
    shutil.rmtree(damaged_file.parent / "__pycache__", ignore_errors=True)
    capfd.readouterr()
    runtime = open_remote(server, speaking_bundle)
    assert damaged_file.read_bytes() == content
    ids = np.array([[5, 60, 7]])
    assert np.array_equal(runtime.embed_tokens(ids), ort.embed_tokens(ids))
    stderr = capfd.readouterr().err
    assert f"has a damaged copy of {description}, which is sent again" in stderr
    assert "connecting again" not in stderr


def test_a_device_that_cannot_use_the_second_copy_is_refused_in_one_sentence(
    server: SshServer, speaking_bundle: Path, tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture
) -> None:
    wheel = tmp_path / "microvlm-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("microvlm/__init__.py", "")
    monkeypatch.setenv("MICROVLM_WHEEL", str(wheel))
    stderr = failure(server, speaking_bundle)
    assert "was sent microvlm again and still cannot use it" in stderr
    assert "check its SD card" in stderr
    assert capfd.readouterr().err.count("sent again") == 1


def test_a_worker_holds_the_folders_that_it_runs_from(server: SshServer, speaking_bundle: Path) -> None:
    runtime = open_remote(server, speaking_bundle)
    pid = runtime.condition()["pid"]
    open_paths = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    for kind in ("bundles", "packages"):
        assert any(str(server.cache / kind) in path for path in open_paths)


def test_a_full_disk_on_the_device_is_one_sentence(
    server: SshServer, speaking_bundle: Path, fresh_cache: Path, run
) -> None:
    part = fresh_cache / "wheels" / f".{package_for(os.uname().machine).digest[:16]}.zip.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    status, out, err = run("info", str(speaking_bundle), "--target", server.target)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("Error: ")
    assert "no space is left on the device's disk" in err
    part.unlink()


def failure(server: SshServer, bundle: Path, target: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        load("ort-arm64", bundle, target=target or server.target)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_machine_that_cannot_be_reached_is_one_sentence(
    server: SshServer, speaking_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = user_name()
    assert "its name is not known here" in failure(server, speaking_bundle, f"ssh:{user}@no-such-pi.invalid")
    assert "no ssh server does" in failure(server, speaking_bundle, f"ssh:{user}@127.0.0.1:1")
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(server.folder / "stranger")], check=True
    )
    command = server.command().replace("user_key", "stranger")
    monkeypatch.setenv("MICROVLM_SSH_COMMAND", command)
    assert "it refused the login: check the user and the key" in failure(server, speaking_bundle)
    command = server.command().replace("accept-new", "yes").replace("/known", "/nobody_known")
    monkeypatch.setenv("MICROVLM_SSH_COMMAND", command)
    assert "its host key is not trusted" in failure(server, speaking_bundle)
    monkeypatch.setenv("MICROVLM_SSH_COMMAND", "no-such-ssh -v")
    assert "'no-such-ssh' was not found: apt-get install openssh-client" in failure(server, speaking_bundle)


def test_a_device_without_a_python_that_can_run_it_is_one_sentence(
    server: SshServer, speaking_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MICROVLM_DEVICE_PYTHON", "/nowhere/python3")
    assert "has no /nowhere/python3: apt-get install python3 there" in failure(server, speaking_bundle)
    old = tmp_path / "old-python"
    program = "import sys;sys.version_info=(3,9,2,'final',0);exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{program}" "$2"\n')
    old.chmod(0o755)
    monkeypatch.setenv("MICROVLM_DEVICE_PYTHON", str(old))
    assert "has Python 3.9 and microvlm needs 3.11 or newer" in failure(server, speaking_bundle)


@pytest.mark.parametrize(
    "place", ["", "pi@", "@host", "-oProxyCommand=x", "pi@host:22:33", "pi@host:x", "a b"]
)
def test_a_malformed_place_is_refused_before_ssh_runs(place: str, speaking_bundle: Path, run) -> None:
    status, out, err = run("info", str(speaking_bundle), "--target", f"ssh:{place}")
    assert (status, out) == (2, "")
    assert "--target" in err
    assert "ssh:USER@HOST" in err


def test_a_login_shell_that_prints_disturbs_nothing(
    speaking_bundle: Path, ort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = 'ForceCommand echo "Linux raspberrypi, no warranty"; eval "$SSH_ORIGINAL_COMMAND"'
    with serving(tmp_path, talk) as chatty:
        monkeypatch.setenv("MICROVLM_SSH_COMMAND", chatty.command())
        ids = np.array([[5, 60, 7]])
        assert np.array_equal(open_remote(chatty, speaking_bundle).embed_tokens(ids), ort.embed_tokens(ids))


@pytest.mark.slow
def test_a_device_with_python_alone_gets_the_required_packages(
    server: SshServer, speaking_bundle: Path, ort, prompt, fresh_cache: Path, tmp_path: Path, monkeypatch
) -> None:
    """Downloads wheels; a virtual environment without any package is the device's Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    monkeypatch.setenv("MICROVLM_DEVICE_PYTHON", str(tmp_path / "bare" / "bin" / "python"))
    remote = open_remote(server, speaking_bundle)
    assert generate(remote, prompt, OPTIONS).tokens == generate(ort, prompt, OPTIONS).tokens
    assert len(list(fresh_cache.glob("sites/*/onnxruntime"))) == 1
