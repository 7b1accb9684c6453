"""The nox sessions, the markers, the public host's workflow and the commands of CONTRIBUTING exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from page_commands import read_blocks

from microvlm.sources.model_source import BUNDLED, DEFAULT_MODEL

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
SYSTEMS = {"linux", "posix"}
"""Markers that skip a test elsewhere; all others take it out of the quick tier."""


@pytest.fixture(scope="module")
def sessions() -> dict[str, str]:
    """Name -> description, as nox lists them."""
    command = [sys.executable, "-m", "nox", "-l", "--nocolor"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return dict(re.findall(r"^[*-] (\S+)(?: -> (.*))?$", process.stdout, re.M))


@pytest.fixture(scope="module")
def workflow() -> dict:
    return yaml.safe_load(WORKFLOW.read_text())


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def markers() -> set[str]:
    return {line.partition(":")[0] for line in project()["tool"]["pytest"]["ini_options"]["markers"]}


def sessions_of(command: str) -> list[str]:
    """The sessions that a nox command names: words after -s until the next flag."""
    words = shlex.split(command, comments=True)
    arguments = words[words.index("-s") + 1 :] if "-s" in words else []
    ends = [place for place, word in enumerate(arguments) if word.startswith("-")]
    return arguments[: ends[0]] if ends else arguments


def test_every_session_has_a_description_of_one_clause(sessions):
    assert {"quick", "lint", "lowest", "latest", "tests", "slow", "build", "equivalence", "pi"} <= set(
        sessions
    )
    for name, description in sessions.items():
        assert description, name
        assert len(description) <= 100, name
        assert not description.endswith("."), name


def test_the_quick_tier_leaves_out_every_marker_of_a_need():
    (expression,) = re.findall(r'^QUICK = "not \((.*)\)"$', (ROOT / "noxfile.py").read_text(), re.M)
    assert set(expression.split(" or ")) == markers() - SYSTEMS


def test_what_is_timed_is_the_default_model_and_what_is_gated_has_a_committed_count():
    """Neither file can import the package: nox has its own environment."""
    timed, small = re.search(
        r'^MODEL, SMALL_MODEL = "(.*)", "(.*)"$', (ROOT / "noxfile.py").read_text(), re.M
    ).groups()
    assert timed == DEFAULT_MODEL
    assert {timed, small} == set(BUNDLED)
    (gated,) = re.findall(r'^GATED = "(.*)"$', (ROOT / ".ci" / "pi.py").read_text(), re.M)
    assert (ROOT / "bench" / "pi" / "baselines" / f"{gated}-cortex-a53.json").is_file()


def test_the_workflow_runs_everything_once_and_quick_on_three_systems(workflow, sessions):
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    # YAML 1.1 reads the key `on` as true.
    assert set(workflow[True]) == {"push", "pull_request"}
    full, quick = workflow["jobs"]["full"], workflow["jobs"]["quick"]
    assert [step["run"] for step in full["steps"] if "run" in step] == ["bash .ci/run"]
    matrix = quick["strategy"]["matrix"]
    assert [system.split("-")[0] for system in matrix["os"]] == ["ubuntu", "macos", "windows"]
    assert matrix["python"] == ["3.11", "3.12", "3.13", "3.14"]
    assert matrix["python"][0] == project()["project"]["requires-python"].removeprefix(">=")
    for job in (full, quick):
        assert job["timeout-minutes"] <= 60
        (python,) = (step["with"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
        assert (ROOT / python["cache-dependency-path"]).is_file()
        assert {name for step in job["steps"] for name in sessions_of(step.get("run", ""))} <= set(sessions)
    runs = [step["run"] for step in quick["steps"] if "run" in step]
    assert sessions_of(runs[-1].splitlines()[-1]) == ["quick"]
    # Links are checked out as links only where Git is configured before the checkout.
    assert [step.get("uses", step.get("run")).split("@")[0] for step in quick["steps"]].index(
        "actions/checkout"
    ) > [step.get("run", "") for step in quick["steps"]].index("git config --global core.symlinks true")


def test_the_ci_script_names_real_sessions(sessions):
    (command,) = (line for line in (ROOT / ".ci" / "run").read_text().splitlines() if ".ci/nox" in line)
    session_names = sessions_of(command)
    assert len(session_names) == 6
    assert set(session_names) <= set(sessions)


def commands() -> list[str]:
    lines = "\n".join(read_blocks(CONTRIBUTING, "bash")).splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip()]


@pytest.mark.pages
def test_the_pages_short_commands_run():
    """Those that start pytest themselves, as they stand there; sessions are minutes, and CI's own commands."""
    short = [command for command in commands() if command.startswith("pytest ")]
    assert short
    for command in short:
        words = [sys.executable, "-P", "-m", *shlex.split(command)]
        process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stdout + process.stderr
        assert "passed" in process.stdout or "100%" in process.stdout


def test_the_pages_long_commands_name_what_exists(sessions):
    extras = project()["project"]["optional-dependencies"]
    kinds = set()
    for command in commands():
        words = shlex.split(command)
        kind = next(word for word in words if word not in ("python3", "-m", "bash", "."))
        kinds.add(kind)
        if kind == "pip":
            (extra,) = (word[word.index("[") + 1 : -1] for word in words if "[" in word)
            assert extra in extras
            assert (ROOT / words[words.index("-c") + 1]).is_file()
        elif "nox" in kind:
            assert set(sessions_of(command)) <= set(sessions), command
            assert "-l" in words or sessions_of(command), command
        elif kind.startswith(".ci/"):
            assert (ROOT / kind).is_file(), command
        else:
            assert kind in ("pytest", "venv", "venv/bin/activate", "git", "ruff", "microvlm-bench"), command
    assert {"pip", "pytest", "nox", ".ci/run"} <= kinds


def test_the_page_explains_every_marker_and_links_to_files_that_exist():
    text = CONTRIBUTING.read_text()
    for marker in markers():
        assert f"`{marker}`" in text, marker
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_changelog_names_modules_that_exist():
    """Its table of moves: an old import path, and the present one."""
    text = (ROOT / "CHANGELOG.md").read_text()
    rows = re.findall(r"^\| `(microvlm[\w.]*)` \| `(microvlm[\w.]*)` \| (.*) \|$", text, re.M)
    assert len(rows) > 10
    for _, package, names in rows:
        for name in names.split(", "):
            new = name.split(" → ")[-1].strip("`")
            assert (ROOT / package.replace(".", "/") / f"{new}.py").is_file(), (
                f"{package}.{new} was moved again"
            )
