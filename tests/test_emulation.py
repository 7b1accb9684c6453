"""The emulated aarch64 Python: a sysroot is built once, completely or not at all, and describes a Raspberry Pi."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path

import pytest

from microvlm.backends import emulation
from microvlm.backends.emulation import sites
from microvlm.backends.emulation.cache import cached_folder
from microvlm.backends.emulation.sysroot import arm64_sources
from microvlm.errors import UserError

RECIPE = {"of": "a test"}
DESCRIBE = """
import ctypes, json, platform
words = open("/proc/cpuinfo").read().split()
capabilities = ctypes.CDLL(None).getauxval(16)
print(json.dumps({
    "machine": platform.machine(), "dot_product": bool(capabilities >> 20 & 1), "part": words[words.index("part") + 2],
    "online": open("/sys/devices/system/cpu/online").read().strip()}))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MICROVLM_CACHE", str(tmp_path))
    return tmp_path / "emulation"


def write_two(folder: Path) -> None:
    (folder / "one").write_text("1")
    (folder / "below").mkdir()
    (folder / "below" / "two").write_text("22")


def test_a_folder_is_built_once(cache: Path) -> None:
    build_folders: list[Path] = []
    first = cached_folder("tree", RECIPE, lambda folder: (build_folders.append(folder), write_two(folder))[1])
    assert cached_folder("tree", RECIPE, build_folders.append) == first
    assert len(build_folders) == 1
    assert cached_folder("tree", {"of": "another"}, write_two) != first
    assert [path for path in cache.iterdir() if path.name.startswith(".")] == []


def test_a_build_that_fails_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> None:
        write_two(folder)
        raise UserError("the network is gone.")

    with pytest.raises(UserError):
        cached_folder("tree", RECIPE, fail)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "damage", ["missing", "cut", "changed", "renamed", "no stamp", "bad stamp", "nested stamp"]
)
def test_a_damaged_folder_is_built_again(cache: Path, damage: str) -> None:
    folder = cached_folder("tree", RECIPE, write_two)
    if damage == "missing":
        (folder / "one").unlink()
    elif damage == "cut":
        (folder / "below" / "two").write_text("2")
    elif damage == "changed":
        (folder / "below" / "two").write_text("33")
    elif damage == "renamed":
        (folder / "below" / "two").rename(folder / "below" / "owt")
    elif damage == "bad stamp":
        (folder / "stamp.json").write_text('{"recipe": null}')
    elif damage == "nested stamp":
        (folder / "stamp.json").write_text("[" * 100_000)
    else:
        (folder / "stamp.json").unlink()
    assert cached_folder("tree", RECIPE, write_two) == folder
    assert (folder / "one").read_text() + (folder / "below" / "two").read_text() == "122"


def test_a_large_folder_is_counted_and_not_hashed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microvlm.backends.emulation.cache.HASHED_BYTES", 2)
    folder = cached_folder("tree", RECIPE, write_two)
    assert "sha256" not in json.loads((folder / "stamp.json").read_text())
    assert cached_folder("tree", RECIPE, lambda _: pytest.fail("built again")) == folder


def test_bytecode_that_the_emulated_python_writes_is_no_damage(cache: Path) -> None:
    folder = cached_folder("tree", RECIPE, write_two)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "one.pyc").write_text("code")
    assert cached_folder("tree", RECIPE, lambda _: pytest.fail("built again")) == folder


def test_folders_of_dead_builders_are_removed(cache: Path) -> None:
    (cache / ".tree-0123.new-0123abcd").mkdir(parents=True)
    cached_folder("tree", RECIPE, write_two)
    assert [path for path in cache.iterdir() if path.name.startswith(".")] == []


def test_a_build_removes_package_folders_that_were_unused_for_long(cache: Path) -> None:
    used_folder = cached_folder("site", {"of": "used"}, write_two)
    unused = cached_folder("site", {"of": "unused"}, write_two)
    sysroot = cached_folder("sysroot", RECIPE, write_two)
    for folder in (used_folder, unused, sysroot):
        os.utime(folder / "stamp.json", (0, 0))
        os.utime(folder, (0, 0))
    cached_folder("site", {"of": "used"}, lambda _: pytest.fail("built again"))
    cached_folder("site", {"of": "another"}, write_two)
    assert used_folder.is_dir()
    assert not unused.exists()
    # A CPU's view of a sysroot links into it, so being looked at does not touch it.
    assert sysroot.is_dir()


def test_each_python_version_of_this_machine_has_its_own_folders(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One version can compile the folder and another cannot, and the counts of instructions differ."""
    monkeypatch.setattr(sites, "python_version", lambda _: "3.11")
    monkeypatch.setattr(sites, "glibc_minor", lambda _: 36)
    monkeypatch.setattr(sites, "_install", lambda folder, *_: write_two(folder))
    folders = set()
    for python in ("3.11.7", "3.13.1", "3.11.7"):
        monkeypatch.setattr(sites.platform, "python_version", lambda python=python: python)
        folders.add(sites.ensure_site(cache, ["numpy"], print))
    assert len(folders) == 2


@pytest.mark.parametrize(
    ("programs", "sentence"),
    [
        ((), "QEMU's aarch64 emulator was not found: apt-get install qemu-user-static."),
        (("qemu-aarch64",), "apt-get was not found: the emulated machine needs Debian or Ubuntu."),
    ],
)
def test_a_missing_program_is_named_in_one_sentence(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: tuple[str, ...], sentence: str
) -> None:
    for name in programs:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as error:
        emulation.open_machine()
    assert str(error.value) == sentence


def test_an_unknown_cpu_is_refused_with_the_known_ones(cache: Path) -> None:
    with pytest.raises(UserError, match=r"'cortex-a7' is not an emulated CPU; choose one of cortex-a53, "):
        emulation.open_machine("cortex-a7")


def test_ubuntus_arm64_packages_come_from_another_mirror_and_debians_do_not() -> None:
    one_line = "deb [arch=amd64 signed-by=/k.gpg] http://archive.ubuntu.com/ubuntu noble main"
    assert (
        arm64_sources(one_line)
        == "deb [arch=arm64 signed-by=/k.gpg] http://ports.ubuntu.com/ubuntu-ports/ noble main"
    )
    stanza = (
        "Types: deb\nURIs: http://security.ubuntu.com/ubuntu/\nSuites: noble-security\nArchitectures: amd64\n"
    )
    ports = "Types: deb\nURIs: http://ports.ubuntu.com/ubuntu-ports/\nSuites: noble-security\nArchitectures: arm64\n"
    assert arm64_sources(stanza) == ports
    debian = "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: bookworm\n"
    assert arm64_sources(debian) == debian


def test_the_device_gets_the_runtime_requirements_at_this_machines_versions() -> None:
    pinned = emulation.runtime_requirements()
    assert f"onnxruntime=={version('onnxruntime')}" in pinned
    assert not any(
        requirement.startswith(("torch", "onnxscript", "pytest", "uvicorn")) for requirement in pinned
    )


def test_an_extras_requirements_come_beside_those_without_and_no_others() -> None:
    pinned, served = emulation.runtime_requirements(), emulation.runtime_requirements("serve")
    assert served[: len(pinned)] == pinned
    assert served[len(pinned) :] == [f"{name}=={version(name)}" for name in ("starlette", "uvicorn")]


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("cpu", "part", "dot_product"), [("cortex-a53", "0xd03", False), ("cortex-a76", "0xd0b", True)]
)
def test_the_emulated_python_sees_the_board_and_not_this_machine(
    cpu: str, part: str, dot_product: bool
) -> None:
    """Builds the sysroot into the user's own cache: apt and some seconds, the first time."""
    result = emulation.open_machine(cpu).run("-c", DESCRIBE)
    assert result.returncode == 0, result.stderr
    described = json.loads(result.stdout)
    assert described == {"machine": "aarch64", "dot_product": dot_product, "part": part, "online": "0-3"}
