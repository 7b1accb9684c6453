"""`ort-arm64` on an emulated Cortex-A53 gives the tokens of `ort` on this machine; packages for a device."""

from __future__ import annotations

import dataclasses
import io
import shutil
import subprocess
from pathlib import Path

import pytest

from microvlm.backends import load, native, resolve_bundle
from microvlm.backends.arm64.frames import GREETING, read_frame, write_frame
from microvlm.backends.arm64.transports.device_package import package_for, unpacked_package
from microvlm.backends.arm64.transports.local import WORKER
from microvlm.backends.emulation import EmulatedMachine, open_machine, runtime_requirements
from microvlm.errors import UserError
from microvlm.generation import GenerationOptions, embed_prompt, generate

CRASHING = "1.21.0"
PICTURE = Path(__file__).resolve().parent.parent / "bench" / "evalset" / "images" / "1f41c.png"

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(
        shutil.which("qemu-aarch64-static") is None and shutil.which("qemu-aarch64") is None,
        reason="needs qemu-user-static",
    ),
]


@pytest.fixture(scope="module")
def nano() -> Path:
    """The bundled checkpoint at 1.58 bit, from the user's own cache, where other sessions of nox have put it."""
    return resolve_bundle("nano")


def caption_and_memory(runtime, processor) -> list:
    """Tokens of a caption, the slot mask of a memory with the image in it, and tokens with that memory."""
    options = GenerationOptions(8, stop_tokens=processor.stop_tokens)
    inputs = processor([processor.config.prompt.caption_prompt], [[PICTURE]])
    prompt = embed_prompt(runtime, *inputs, processor.image_id)
    tokens = generate(runtime, prompt, options).tokens
    latent, key = runtime.memory_encode(*prompt)
    state = runtime.memory_write(key, latent, runtime.memory_prior())
    result = generate(runtime, prompt, options, state)
    return [tokens, result.memory_slot.slot_mask.tolist(), result.tokens]


def test_an_emulated_a53_gives_the_tokens_of_this_machine(nano: Path) -> None:
    """Builds the sysroot and a folder of packages into the user's own cache the first time."""
    from microvlm.inputs.processor import Processor

    processor = Processor.from_pretrained(nano)
    board = load("ort-arm64", nano, threads=2, target="emulated")
    assert board.device["machine"] == "aarch64"
    assert board.device["cpu"] == "Cortex-A53"
    assert board.device["features"] == ["fp", "asimd", "evtstrm", "crc32", "cpuid"]
    if package_for("aarch64").no_library_reason:
        assert "function bodies in the graphs (no native library: " in board.kernels
    else:
        assert board.kernels.startswith("native neon on Cortex-A53 (aarch64, emulated:cortex-a53)")
    assert caption_and_memory(board, processor) == caption_and_memory(load("ort", nano, threads=2), processor)


def answer_of(machine: EmulatedMachine, *arguments: str) -> dict:
    """The answer to `load` of a worker that Python starts with `arguments`."""
    request = io.BytesIO()
    write_frame(request, {"id": 1, "do": "load", "bundle": "/nowhere", "settings": {}})
    result = subprocess.run(
        machine.command(*arguments),
        env=machine.environment(),
        input=request.getvalue(),
        capture_output=True,
        cwd="/",
    )
    answers = io.BytesIO(result.stdout)
    assert answers.readline() == GREETING + b"\n"
    return read_frame(answers)[0]


def test_a_version_known_to_crash_is_refused_before_it_is_imported(tmp_path: Path) -> None:
    """A package of that name and version exits with a message where it is imported."""
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise SystemExit('imported')\n")
    info = tmp_path / f"onnxruntime-{CRASHING}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: onnxruntime\nVersion: {CRASHING}\n")
    machine = open_machine(requirements=runtime_requirements())
    machine = dataclasses.replace(machine, sites=(tmp_path, unpacked_package("aarch64"), *machine.sites))
    assert answer_of(machine, *WORKER)["error"] == (
        f"onnxruntime {CRASHING} crashes on this processor (Cortex-A53): it runs half-precision instructions when it "
        "is loaded; pip install 'onnxruntime>=1.25'."
    )


@pytest.mark.slow
def test_a_version_that_crashes_unexpectedly_is_explained_in_one_sentence() -> None:
    """The real wheel of that version, with the table of known ones empty; downloads it."""
    requirements = [
        requirement for requirement in runtime_requirements() if not requirement.startswith("onnxruntime")
    ]
    machine = open_machine(requirements=[*requirements, f"onnxruntime=={CRASHING}"])
    machine = dataclasses.replace(machine, sites=(unpacked_package("aarch64"), *machine.sites))
    program = (
        "import sys\n"
        "from microvlm.backends.arm64.device import machine_facts, worker\n"
        "machine_facts.CRASHES.clear()\n"
        "machine_facts.OLDEST_ONNXRUNTIME = (1, 0)\n"
        "sys.exit(worker.main())\n"
    )
    assert answer_of(machine, "-c", program) == {
        "id": None,
        "error": "this processor lacks an instruction (SIGILL) that was needed while importing onnxruntime "
        f"{CRASHING}: install another version of onnxruntime.",
    }


def test_a_wheel_of_another_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = package_for("aarch64")
    wheel = tmp_path / "microvlm-0.1.0-py3-none-manylinux_2_17_x86_64.whl"
    wheel.write_bytes(package.content)
    monkeypatch.setenv("MICROVLM_WHEEL", str(wheel))
    with pytest.raises(UserError, match="is a wheel for another machine than aarch64"):
        package_for("aarch64")
    right = wheel.rename(tmp_path / "microvlm-0.1.0-py3-none-manylinux_2_17_aarch64.whl")
    monkeypatch.setenv("MICROVLM_WHEEL", str(right))
    assert package_for("aarch64").content == package.content
    right.write_bytes(b"no zip")
    with pytest.raises(UserError, match="is not a wheel"):
        package_for("aarch64")


def test_the_package_for_a_device_is_the_same_bytes_each_time_and_holds_no_checkpoint() -> None:
    import zipfile

    first, second = package_for("aarch64"), package_for("aarch64")
    assert first.digest == second.digest
    names = zipfile.ZipFile(io.BytesIO(first.content)).namelist()
    assert "microvlm/backends/arm64/device/worker.py" in names
    assert not [name for name in names if "checkpoints" in name or "training" in name]
    has_library = f"microvlm/backends/native/{native.LIBRARY}" in names
    assert has_library == (first.no_library_reason == "")


def test_a_machine_without_a_cross_compiler_runs_on_the_function_bodies_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    package = package_for("aarch64")
    assert "aarch64" in package.no_library_reason
