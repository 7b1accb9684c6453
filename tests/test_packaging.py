"""pip builds the native library where a compiler exists, and else a package that says why it has none."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from check_wheel import LIBRARY, REASON, check, check_library

ROOT = Path(__file__).parent.parent
GENERATED = (
    ".*",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    "*.so",
    "not_built.txt",
    "data",
    "runs",
    "reports",
    "bundles",
    "venv",
)
MANYLINUX = "manylinux_2_17_x86_64"
CARD = "microvlm/checkpoints/photo/MODEL_CARD.md"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source_copy = tmp_path_factory.mktemp("packaging") / "source"
    shutil.copytree(ROOT, source_copy, symlinks=True, ignore=shutil.ignore_patterns(*GENERATED))
    for parts in (("data",), ("emoji", "data"), ("photo", "data")):
        folder = Path("training", *parts)
        shutil.copytree(ROOT / folder, source_copy / folder, dirs_exist_ok=True)
    return source_copy


def hook(source: Path, call: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a hook of the build back end in a process of its own, as build front ends do."""
    ours = (
        "CXX",
        "CMAKE_ARGS",
        "CMAKE_GENERATOR",
        "CMAKE_TOOLCHAIN_FILE",
        "MICROVLM_BUILD_NATIVE",
        "PYTHONSAFEPATH",
    )
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta; print(build_meta.{call})"],
        cwd=source,
        capture_output=True,
        text=True,
        env={**inherited, **environment},
    )


def build_wheel(source: Path, out: Path, **environment: str) -> tuple[Path, str]:
    """(wheel, log)."""
    process = hook(source, f"build_wheel({str(out)!r})", **environment)
    assert process.returncode == 0, process.stdout + process.stderr
    return out / process.stdout.splitlines()[-1], process.stdout


def run_installed(wheel: Path, folder: Path, code: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(folder), "MICROVLM_NATIVE": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture
def broken_compiler(tmp_path: Path) -> str:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'error: this compiler is broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    return str(compiler)


@pytest.mark.build
def test_a_checkout_without_links_gets_them_back_and_builds_the_same_wheel(
    source: Path, tmp_path: Path
) -> None:
    """Git writes a link as a text file where it may not make links, as on Windows by default."""
    checkout = shutil.copytree(source, tmp_path / "checkout", symlinks=True)
    links = [path for path in (checkout / "microvlm").iterdir() if path.is_symlink()]
    assert sorted(link.name for link in links) == ["backends", "bench", "exporters", "training"]
    links.append(checkout / CARD)
    for link in links:
        target = os.readlink(link)
        link.unlink()
        link.write_text(target)
    wheels = [
        build_wheel(folder, tmp_path / folder.name, PATH=str(tmp_path))[0] for folder in (source, checkout)
    ]
    names = [sorted(zipfile.ZipFile(wheel).namelist()) for wheel in wheels]
    assert names[0] == names[1]
    cards = [zipfile.ZipFile(wheel).read(CARD) for wheel in wheels]
    assert cards == [(ROOT / "docs" / "model-card.md").read_bytes()] * 2
    assert check(wheels[1]) == []
    assert all(link.is_symlink() for link in links)


def test_without_a_compiler_the_wheel_is_for_any_machine_and_says_why(source: Path, tmp_path: Path) -> None:
    wheel, log = build_wheel(source, tmp_path, PATH=str(tmp_path))
    assert "no native library: no C++ compiler was found when the package was built" in log
    assert wheel.name.endswith("-py3-none-any.whl")
    assert check(wheel) == []
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(REASON) == b"no C++ compiler was found when the package was built\n"
    code = "import sys; sys.argv = ['microvlm', 'info']; from microvlm.commands.main import main; main()"
    output = run_installed(wheel, tmp_path / "installed", code)
    assert "function bodies in the graphs (no native library: no C++ compiler was found" in output


@pytest.mark.build
def test_with_a_compiler_the_wheel_is_for_this_machine_and_its_library_runs(
    source: Path, tmp_path: Path
) -> None:
    wheel, _ = build_wheel(source, tmp_path, MICROVLM_BUILD_NATIVE="1")
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    assert check(wheel) == []
    folder = tmp_path / "installed"
    code = "from microvlm.backends import native; print(native.library_path(), native.active_variant())"
    path, variant = run_installed(wheel, folder, code).split()
    assert path == str((folder / LIBRARY).resolve())
    assert variant
    # The same folder again without it: what the first build left there must not get in.
    pure_wheel, _ = build_wheel(source, tmp_path, MICROVLM_BUILD_NATIVE="0")
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert check(pure_wheel) == []


@pytest.mark.build
def test_a_broken_compiler_is_a_warning(source: Path, tmp_path: Path, broken_compiler: str) -> None:
    wheel, log = build_wheel(source, tmp_path, CXX=broken_compiler)
    assert "no native library: the build failed" in log
    assert check(wheel) == []


@pytest.mark.build
def test_a_broken_compiler_is_an_error_where_the_library_is_required(
    source: Path, tmp_path: Path, broken_compiler: str
) -> None:
    call = f"build_wheel({str(tmp_path)!r})"
    process = hook(source, call, CXX=broken_compiler, MICROVLM_BUILD_NATIVE="1")
    assert process.returncode != 0
    assert "MICROVLM_BUILD_NATIVE=1, but there is no native library: the build failed" in process.stderr
    assert list(tmp_path.glob("*.whl")) == []


@pytest.mark.build
def test_an_editable_install_without_a_build_keeps_the_library_of_the_checkout(
    source: Path, tmp_path: Path
) -> None:
    library = source / "backends" / "native" / Path(LIBRARY).name
    reason = library.with_name(Path(REASON).name)
    call = f"build_editable({str(tmp_path)!r})"
    try:
        assert hook(source, call, MICROVLM_BUILD_NATIVE="0").returncode == 0
        assert reason.read_text() == "it was left out with MICROVLM_BUILD_NATIVE=0\n"
        reason.unlink()
        library.write_bytes(b"built before")
        assert hook(source, call, MICROVLM_BUILD_NATIVE="0").returncode == 0
        assert library.read_bytes() == b"built before"
        assert not reason.exists()
    finally:
        library.unlink(missing_ok=True)
        reason.unlink(missing_ok=True)


@pytest.mark.build
def test_the_switch_is_0_or_1(source: Path) -> None:
    process = hook(source, "get_requires_for_build_wheel()", MICROVLM_BUILD_NATIVE="yes")
    assert process.returncode != 0
    assert "MICROVLM_BUILD_NATIVE is 'yes'" in process.stderr


@pytest.mark.build
def test_cmake_is_asked_for_only_where_a_compiler_is_and_the_system_has_none(
    source: Path, tmp_path: Path, broken_compiler: str
) -> None:
    # Beside the interpreter of a test environment CMake may lie; a link to it elsewhere has no such neighbours.
    def requirements(**environment: str) -> str:
        process = hook(source, "get_requires_for_build_wheel()", **environment)
        assert process.returncode == 0, process.stderr
        return process.stdout.splitlines()[-1]

    beside = Path(sys.executable).parent
    if not (beside / "cmake").exists():
        expected = "['cmake>=3.20']" if (beside / "ninja").exists() else "['cmake>=3.20', 'ninja']"
        assert requirements(PATH=str(tmp_path)) == expected
    assert requirements(PATH=str(tmp_path / "nothing")) == "[]"
    assert requirements(PATH=str(tmp_path), MICROVLM_BUILD_NATIVE="0") == "[]"


@pytest.mark.build
def test_the_source_distribution_has_what_a_build_needs(source: Path, tmp_path: Path) -> None:
    process = hook(source, f"build_sdist({str(tmp_path)!r})")
    assert process.returncode == 0, process.stderr
    with tarfile.open(tmp_path / process.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    # There the links are the folders that they lead to.
    folder = source / "backends" / "native"
    native = {f"microvlm/backends/native/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*")}
    assert {"setup.py", "pyproject.toml", "microvlm/backends/native/CMakeLists.txt"} <= names
    assert {name for name in native if name.endswith((".cpp", ".h", ".py"))} <= names


def elf(machine: int, *strings: bytes) -> bytes:
    return b"\x7fELF" + bytes(14) + machine.to_bytes(2, "little") + b"\0".join((b"", *strings, b""))


@pytest.mark.parametrize(
    ("library", "complaint"),
    [
        (elf(62, b"GLIBC_2.2.5", b"GLIBC_2.14"), None),
        (elf(183), "the library is for aarch64 and the wheel for manylinux_2_17_x86_64"),
        (elf(62, b"GLIBC_2.34"), "the library needs glibc 2.34 and the wheel says 2.17"),
        (elf(62, b"libstdc++.so.6"), "the library needs a C++ runtime"),
        (elf(62, b"/home/someone/ops/kernels.cpp"), "the path /home/someone/ops/kernels.cpp"),
    ],
)
def test_the_check_of_a_library_finds(library: bytes, complaint: str | None) -> None:
    complaints = check_library(library, MANYLINUX)
    assert len(complaints) == (complaint is not None)
    assert complaint is None or complaint in complaints[0]
