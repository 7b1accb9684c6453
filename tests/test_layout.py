"""The layout of the repository: a module's import path is its path on disk, and a checkout works without an install."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import microvlm
from microvlm.backends.base import BUILT_IN

ROOT = Path(__file__).parent.parent
LINKED = ("backends", "bench", "exporters", "training")
SOURCES = (".py", ".cpp", ".h", ".c")
MOST_FILES = 16
"""The most files in one folder that a reader takes in at a glance."""


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module that is reached from microvlm/, links followed."""
    paths = {}
    for folder, _, names in os.walk(ROOT / "microvlm", followlinks=True):
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                parts = path.relative_to(ROOT).with_suffix("").parts
                paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


@pytest.fixture(scope="module")
def uninstalled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment for `python -S` that has this Python's packages, but no trace of an installed microvlm."""
    if os.name == "nt":
        pytest.skip("links to files need a privilege on Windows")
    packages = tmp_path_factory.mktemp("packages")
    for folder in (Path(entry) for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))):
        for path in folder.iterdir():
            link = packages / path.name
            if not path.name.lower().startswith(("microvlm", "__editable__")) and not link.is_symlink():
                link.symlink_to(path)
    checkout = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name in (*LINKED, "microvlm", "pyproject.toml"):
            (checkout / path.name).symlink_to(path)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return {**variables, "PYTHONPATH": str(packages), "CHECKOUT": str(checkout)}


def run(environment: dict[str, str], program: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-S", "-c", program]
    return subprocess.run(
        command, cwd=environment["CHECKOUT"], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", LINKED)
def test_a_bare_import_of_a_linked_folder_is_one_sentence_with_the_right_name(name, uninstalled):
    process = run(uninstalled, f"import {name}")
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].endswith(
        f"this folder is part of the package microvlm: write 'import microvlm.{name}'."
    )


def test_every_modules_import_path_is_its_path_on_disk(uninstalled):
    program = (
        "import importlib.util, sys\n"
        "for name in sys.stdin.read().split():\n"
        "    print(name, importlib.util.find_spec(name).origin)"
    )
    source_paths = modules()
    process = subprocess.run(
        [sys.executable, "-S", "-c", program],
        input="\n".join(source_paths),
        cwd=uninstalled["CHECKOUT"],
        env=uninstalled,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    imported_paths = dict(line.split(" ", 1) for line in process.stdout.splitlines())
    assert len(imported_paths) == len(source_paths) > 150
    for name, path in source_paths.items():
        assert Path(imported_paths[name]).resolve() == path.resolve()


def test_every_module_has_one_name_only():
    files = Counter(path.resolve() for path in modules().values())
    assert [str(path) for path, names in files.items() if names > 1] == []
    top = {path for folder in LINKED for path in (ROOT / folder).rglob("*.py")}
    assert top <= set(files)


def test_no_folder_holds_more_source_files_than_a_reader_takes_in():
    folders = Counter(
        path.parent.relative_to(ROOT)
        for folder in ("microvlm", *LINKED, ".ci", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SOURCES
    )
    assert {str(folder): files for folder, files in folders.items() if files > MOST_FILES} == {}


def test_the_built_in_backends_are_pyprojects_entry_points():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["microvlm.backends"] == BUILT_IN


def test_a_checkout_that_was_never_installed_finds_its_backends_and_its_version(uninstalled):
    program = """
import importlib.metadata, microvlm, microvlm.backends as backends
from microvlm.backends.resolve import exporter_digest
try:
    importlib.metadata.version("microvlm")
except importlib.metadata.PackageNotFoundError:
    print("not installed")
print(backends.backend_names(), backends.get_backend("ort").unavailable(), len(exporter_digest()))
from microvlm.commands.main import cli
cli(["--version"], prog_name="microvlm")
"""
    process = run(uninstalled, program)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [
        "not installed",
        "['ort', 'ort-arm64', 'torch'] None 12",
        f"microvlm, version {microvlm.__version__}",
    ]


def test_an_emulated_device_asks_an_uninstalled_checkout_to_be_installed(uninstalled):
    program = """
from microvlm.backends.emulation.sites import runtime_requirements
from microvlm.errors import UserError
try:
    runtime_requirements()
except UserError as error:
    print(error)
"""
    process = run(uninstalled, program)
    assert (
        process.stdout == "microvlm is not installed here, only its folder is: run pip install -e . there.\n"
    ), process.stderr
