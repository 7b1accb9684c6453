"""README's commands are run as they stand there, in a folder that holds the repository's evaluation pictures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from microvlm.backends.resolve import cache_directory

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.M | re.S)
TRAINING = ("microvlm-data", "microvlm-train", "microvlm-score")


def blocks(language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall((ROOT / "README.md").read_text()) if kind == language]


def commands() -> list[str]:
    return [
        line.split("   #")[0].strip() for body in blocks("bash") for line in body.splitlines() if line.strip()
    ]


def run(command: str, folder: Path, **environment: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, "MICROVLM_CACHE": str(folder / "cache"), **environment},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its cache is empty but for the emulated machine, which is the user's own, as in every test that emulates one."""
    made = tmp_path_factory.mktemp("readme")
    (made / "bench").symlink_to(ROOT / "bench")
    emulation = cache_directory().resolve() / "emulation"
    emulation.mkdir(parents=True, exist_ok=True)
    (made / "cache").mkdir()
    (made / "cache" / "emulation").symlink_to(emulation)
    return made


@pytest.mark.pages
def test_every_user_command_of_the_readme_runs(folder: Path) -> None:
    users = [
        c
        for c in commands()
        if re.search(r"\bmicrovlm(-export|-bench)?\b|\bexample\.py\b", c) and not c.startswith(TRAINING)
    ]
    users = [c for c in users if not c.startswith(("pip ", "bash "))]
    assert len(users) >= 8
    for command in users:
        run(command, folder)
    assert (folder / "attention.png").stat().st_size > 1000
    assert (folder / "trip.mem").is_file()


@pytest.mark.pages
def test_the_python_example_of_the_readme_prints_a_caption(folder: Path) -> None:
    (example,) = blocks("python")
    (folder / "example.py").write_text(example)
    assert run(f"{sys.executable} example.py", folder).startswith("['")


def test_nox_sessions_named_in_the_readme_exist() -> None:
    defined = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.M))
    named = [c.split(" -s ")[1].split() for c in commands() if c.startswith("bash .ci/nox")]
    assert len(named) == 2
    assert {name for names in named for name in names} <= defined


def test_the_ci_script_is_the_readmes_test_command() -> None:
    test_command = [c for c in commands() if c.startswith("bash .ci/nox")][1]
    assert test_command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_extras_named_in_the_readme_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"pip install '\.\[(\w+)\]'", (ROOT / "README.md").read_text())
    assert named
    assert set(named) <= set(project["optional-dependencies"])


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


@pytest.mark.slow
@pytest.mark.pages
def test_the_training_commands_of_the_readme_run_from_nothing(tmp_path: Path) -> None:
    """Needs npm. Stopped after two steps and resumed; a whole run takes an hour and is not waited for."""
    data, train = (next(c for c in commands() if c.startswith(name)) for name in TRAINING[:2])
    run(data, tmp_path)
    for _ in range(2):
        run(train + " --stop-after 2", tmp_path)
    progress = (tmp_path / "runs" / "nano" / "distill" / "progress.json").read_text()
    assert '"step": 4' in progress
