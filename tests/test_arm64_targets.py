"""--target: the machine that each form names, and the sentence for an unknown one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_backend_registry import run_without_torch

from microvlm.backends import get_backend, load
from microvlm.backends.arm64.targets import default_target, open_transport
from microvlm.errors import UserError


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Names -> a search path with these programs alone, on an x86-64 machine without $MICROVLM_TARGET."""

    def make(*names: str) -> None:
        for name in names:
            (tmp_path / name).touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        monkeypatch.delenv("MICROVLM_TARGET", raising=False)

    return make


def test_an_arm64_machine_is_its_own_default_target(programs, monkeypatch: pytest.MonkeyPatch) -> None:
    programs()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert default_target() == "local"
    assert get_backend("ort-arm64").unavailable() is None


def test_another_machine_emulates_one_where_qemu_is_installed(programs) -> None:
    programs("qemu-aarch64-static")
    assert default_target() == "emulated"
    assert get_backend("ort-arm64").unavailable() is None


def test_without_an_emulator_a_target_has_to_be_named(programs) -> None:
    programs("ssh")
    assert get_backend("ort-arm64").unavailable() is None
    with pytest.raises(
        UserError, match=r"this machine is x86_64: give --target ssh:USER@HOST, or apt-get install"
    ):
        default_target()


def test_without_ssh_and_emulator_the_backend_names_what_to_install(programs) -> None:
    programs()
    with pytest.raises(UserError, match=r"'ort-arm64' cannot run here: .*apt-get install qemu-user-static"):
        load("ort-arm64", "nano")


def test_the_environment_names_the_default_target(programs, monkeypatch: pytest.MonkeyPatch) -> None:
    programs("qemu-aarch64-static")
    monkeypatch.setenv("MICROVLM_TARGET", "ssh:pi@raspberrypi.local")
    assert open_transport(None).name == "ssh:pi@raspberrypi.local"
    assert open_transport("emulated:cortex-a76").name == "emulated:cortex-a76"
    assert open_transport("ssh:pi@[fe80::1%eth0]:2222").name == "ssh:pi@[fe80::1%eth0]:2222"


@pytest.mark.parametrize("target", ["pi", "ssh:", "local:8", "docker:pi", ":", "ssh"])
def test_an_unknown_target_lists_the_forms(target: str) -> None:
    with pytest.raises(UserError, match=r"--target .*ssh:USER@HOST"):
        open_transport(target)


def test_an_emulated_target_without_an_emulator_names_the_package(programs, speaking_bundle: Path) -> None:
    programs("ssh")
    with pytest.raises(UserError, match=r"emulator was not found: apt-get install qemu-user-static\."):
        load("ort-arm64", speaking_bundle, target="emulated")


def test_a_target_selects_this_backend_and_other_backends_refuse_one(speaking_bundle: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from microvlm.commands.main import main; main()",
        "info",
        str(speaking_bundle),
    ]
    result = subprocess.run([*command, "--target", "local"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "local)" in result.stdout
    result = subprocess.run(
        [*command, "--target", "local", "--backend", "ort"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr == "Error: backend 'ort' has no option 'target'.\n"


def test_host_and_worker_need_no_torch_and_the_host_no_onnxruntime(speaking_bundle: Path) -> None:
    program = """
    from microvlm.backends import load
    import numpy as np
    runtime = load("ort-arm64", sys.argv[1], target="local")
    assert runtime.embed_tokens(np.array([[1, 2]])).shape == (1, 2, 64)
    assert "onnxruntime" not in sys.modules and "torch" not in sys.modules
    """
    result = run_without_torch(program, str(speaking_bundle))
    assert result.returncode == 0, result.stderr
