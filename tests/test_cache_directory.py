"""The cache: where it is, and every way in which it cannot be used, as a sentence that names MICROVLM_CACHE."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import another_user
from PIL import Image

import microvlm
from microvlm.backends import resolve_bundle
from microvlm.backends.emulation.cache import cached_folder
from microvlm.bench.full.qwen_tokenizer import qwen_tokenizer
from microvlm.bench.full.random_bundle import random_full_bundle
from microvlm.errors import UserError
from microvlm.sources.cache_directory import cache_directory, writable_cache

REMEDY = "set MICROVLM_CACHE to a folder that you may write to."


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> pytest.MonkeyPatch:
    for name in ("MICROVLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"HOME": "/somewhere"}, "/somewhere/.cache/microvlm"),
        ({"HOME": "/"}, "/.cache/microvlm"),
        ({"HOME": "/somewhere", "XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere/microvlm"),
        ({"HOME": "/somewhere", "XDG_CACHE_HOME": "relative"}, "/somewhere/.cache/microvlm"),
        ({"HOME": "/somewhere", "XDG_CACHE_HOME": ""}, "/somewhere/.cache/microvlm"),
        ({"XDG_CACHE_HOME": "/elsewhere", "MICROVLM_CACHE": "/chosen"}, "/chosen"),
        ({"HOME": "/somewhere", "MICROVLM_CACHE": ""}, "/somewhere/.cache/microvlm"),
    ],
    ids=str,
)
@pytest.mark.posix
def test_where_the_cache_is(variables, folder, environment):
    for name, value in variables.items():
        environment.setenv(name, value)
    assert cache_directory() == Path(folder)


def test_a_relative_cache_is_below_the_working_directory(tmp_path, environment):
    environment.chdir(tmp_path)
    environment.setenv("MICROVLM_CACHE", "mine")
    assert cache_directory() == tmp_path / "mine"
    assert not (tmp_path / "mine").exists()
    assert writable_cache("bundles").is_dir()


@pytest.mark.parametrize("home", ["", "relative"])
@pytest.mark.posix
def test_a_home_that_is_no_absolute_path_is_none(home, environment):
    environment.setenv("HOME", home)
    with pytest.raises(UserError, match="this user has no home folder") as error:
        cache_directory()
    assert str(error.value).endswith(REMEDY)


def test_a_file_in_the_place_of_the_cache_is_named(tmp_path, environment):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        environment.setenv("MICROVLM_CACHE", str(path))
        for function in (cache_directory, writable_cache):
            with pytest.raises(
                UserError, match=f"the cache {path} is not a folder, or lies below a file: set"
            ):
                function()


@pytest.mark.parametrize(
    "use",
    [
        lambda: cached_folder("site", {}, lambda folder: None),
        random_full_bundle,
        lambda: resolve_bundle("nano"),
        lambda: microvlm.load("nano", "ort"),
    ],
    ids=["emulation", "random full bundle", "bundle", "load"],
)
def test_whoever_needs_an_unwritable_cache_gets_one_sentence(use, public_folder, environment):
    environment.setenv("MICROVLM_CACHE", str(public_folder / "cache"))
    with (
        another_user(),
        pytest.raises(UserError, match=r"the cache cannot be used .*Permission denied") as error,
    ):
        use()
    assert str(error.value).endswith(REMEDY)
    assert not list(public_folder.iterdir())


def test_a_download_does_not_begin_where_it_cannot_be_kept(public_folder, environment, tmp_path):
    npm = public_folder / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\nexit 3\n")
    npm.chmod(0o755)
    environment.setenv("PATH", str(npm.parent), prepend=os.pathsep)
    environment.setenv("MICROVLM_CACHE", str(public_folder / "cache"))
    with another_user(), pytest.raises(UserError, match="the cache cannot be used"):
        qwen_tokenizer()


def test_a_cache_that_others_may_only_read_serves_what_it_has(
    public_folder, speaking_checkpoint, speaking_bundle, environment
):
    shutil.copytree(speaking_checkpoint, public_folder / "checkpoint")
    shutil.copytree(speaking_bundle, public_folder / "cache" / "bundles" / speaking_bundle.name)
    for path in public_folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    environment.setenv("MICROVLM_CACHE", str(public_folder / "cache"))
    with another_user():
        assert resolve_bundle(public_folder / "checkpoint").name == speaking_bundle.name
        with pytest.raises(UserError, match=r"the cache cannot be used .*Permission denied"):
            resolve_bundle(public_folder / "checkpoint", bits=8)


def test_a_cache_that_may_not_be_looked_into_is_one_sentence(public_folder, environment):
    (public_folder / "closed").mkdir(0o700)
    environment.setenv("MICROVLM_CACHE", str(public_folder / "closed" / "cache"))
    with another_user(), pytest.raises(UserError, match=r"the cache cannot be used .*Permission denied"):
        cache_directory()


COMMAND = """
import sys
from microvlm.console import run_click
if sys.argv[1] == "microvlm":
    from microvlm.commands.main import cli as command
else:
    from microvlm.bench.bench_command import command
run_click(command, sys.argv[2:])
"""


@pytest.mark.parametrize(
    "command",
    [
        ("microvlm", "caption", "PICTURE", "--model", "nano", "--backend", "ort"),
        ("microvlm", "caption", "PICTURE", "--model", "nano", "--target", "emulated"),
        ("microvlm-bench", "full"),
        ("microvlm-bench", "equivalence", "nano"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("home", [None, "/"], ids=["no home", "HOME=/"])
def test_a_user_that_the_system_does_not_know_gets_one_sentence(command, home, public_folder):
    """As in a container that runs as `--user 12345`."""
    Image.new("RGB", (32, 32), "red").save(public_folder / "red.png")
    (public_folder / "red.png").chmod(0o644)
    hidden = ("HOME", "MICROVLM_CACHE", "XDG_CACHE_HOME")
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    if home is not None:
        variables["HOME"] = home
    arguments = [str(public_folder / "red.png") if word == "PICTURE" else word for word in command]
    python = ["setpriv", "--reuid", "12345", "--clear-groups", sys.executable, "-P", "-c"]
    try:
        subprocess.run([*python, "import numpy"], env=variables, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs setpriv, and a Python that every user may read")
    process = subprocess.run(
        [*python, COMMAND, *arguments],
        cwd=public_folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (process.returncode, process.stdout) == (2, "")
    reason = "this user has no home folder" if home is None else "the cache cannot be used (/.cache"
    assert process.stderr.startswith(f"Error: {reason}")
    assert process.stderr.endswith(f"{REMEDY}\n")
    assert process.stderr.count("\n") == 1
