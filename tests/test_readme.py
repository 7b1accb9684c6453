"""README: one page whose commands, extras and sessions are real. tests/test_pages.py runs its console commands."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from page_commands import read_blocks

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
LONGEST_LINES = 120


def nox_commands() -> list[str]:
    lines = [line for block in read_blocks(README, "bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("bash .ci/nox")]


def test_the_readme_is_one_page() -> None:
    assert len(README.read_text().splitlines()) <= LONGEST_LINES


def test_nox_sessions_named_in_the_readme_exist() -> None:
    defined = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.M))
    sessions = [command.split(" -s ")[1].split() for command in nox_commands()]
    assert len(sessions) == 2
    assert {name for names in sessions for name in names} <= defined


def test_the_ci_script_is_the_readmes_test_command() -> None:
    assert nox_commands()[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_extras_named_in_the_pages_exist() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for page in (README, *ROOT.glob("docs/*.md")):
        named = re.findall(r"pip install (?:-e )?'(?:\.|microvlm)\[(\w+)\]'", page.read_text())
        assert set(named) <= extras, page.name
        assert named or page is not README


def test_every_folder_in_the_readmes_tree_exists() -> None:
    tree = README.read_text().split("## Where things are")[1].split("```")[1]
    top = re.findall(r"(?m)^(\w+)/", tree)
    assert {"microvlm", "exporters", "backends", "bench", "training", "docs", "tests"} == set(top)
    inside = re.findall(r"(?m)^  (\w+)/|  (\w+)/   ", tree)
    folders = [Path("microvlm", name) for pair in inside for name in pair if name]
    assert len(folders) == 4
    assert all((ROOT / folder).is_dir() for folder in [*map(Path, top), *folders])
    pages = re.search(r"(?m)^docs/ +(.*)$", tree)[1].split(", ")
    assert sorted(pages) == sorted(path.stem for path in ROOT.glob("docs/*.md"))


@pytest.mark.slow
@pytest.mark.pages
def test_the_training_commands_of_the_page_run_from_nothing(tmp_path: Path) -> None:
    """Needs npm. Stopped after two steps and resumed; a whole run takes an hour and is not waited for."""
    block = read_blocks(ROOT / "docs" / "training-nano.md", "bash")[0]
    data, train = (
        next(line for line in block.splitlines() if line.startswith(program))
        for program in ("microvlm-data emoji", "microvlm-train")
    )
    path = str(Path(sys.executable).parent)
    for command in (data, f"{train} --stop-after 2", f"{train} --stop-after 2"):
        subprocess.run(["bash", "-c", f'PATH="{path}:$PATH"; {command}'], cwd=tmp_path, check=True)
    states = (tmp_path / "runs" / "nano" / "distill" / "states").iterdir()
    assert max(path.name for path in states) == "00000004"
