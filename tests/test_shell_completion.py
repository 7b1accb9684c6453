"""Completion of every console script in real shells, and what it must not import."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from terminals import Terminal

from microvlm.cli import PROGRAMS
from microvlm.presets import preset_names
from microvlm.sources.model_source import BUNDLED
from microvlm.terminal import shell_completion
from microvlm.training.recipe import packaged_recipes

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "onnxruntime", "onnx", "transformers", "tokenizers", "scipy", "matplotlib")
"""What takes a second or more to import, or most of one."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Console scripts of this checkout on PATH, as an installer writes them, and a home of their own."""
    folder = tmp_path_factory.mktemp("bin")
    for program, module in PROGRAMS.items():
        path = folder / program
        path.write_text(f"#!{sys.executable}\nfrom {module} import main\nmain()\n")
        path.chmod(0o755)
    home = tmp_path_factory.mktemp("home")
    path = os.pathsep.join([str(folder), os.environ.get("PATH", os.defpath)])
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "BASH_", "ZDOTDIR"))},
        "PATH": path,
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm",
        "PS1": "$ ",
    }


def completions(environment: dict[str, str], *words: str, cwd: Path | None = None) -> list[str]:
    """What the program itself offers for its last word, by the protocol of click's script for fish."""
    program = words[0]
    variables = {
        f"_{program.replace('-', '_').upper()}_COMPLETE": "fish_complete",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": words[-1],
    }
    process = subprocess.run(
        [program], env=environment | variables, capture_output=True, text=True, cwd=cwd, timeout=120
    )
    assert process.stderr == ""
    return [line.partition("\t")[0] for line in process.stdout.splitlines()]


def test_the_programs_are_pyprojects_scripts():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    cli = importlib.import_module("microvlm.cli")
    assert list(PROGRAMS) == list(scripts)
    assert all(callable(getattr(cli, target.partition(":")[2])) for target in scripts.values())


@pytest.mark.posix
def test_names_are_completed_where_they_are_known(environment, tmp_path):
    assert completions(environment, "microvlm", "cap") == ["plain,caption"]
    assert completions(environment, "microvlm", "memory", "fo") == ["plain,forget"]
    assert completions(environment, "microvlm", "caption", "--backend", "o") == [
        "plain,ort",
        "plain,ort-arm64",
    ]
    models = [f"plain,{name}" for name in BUNDLED]
    assert completions(environment, "microvlm", "info", "", cwd=tmp_path) == models
    assert completions(environment, "microvlm", "caption", "pic") == ["file,pic"]
    assert completions(environment, "microvlm-export", "--bits", "1") == ["plain,16", "plain,1.58"]
    presets = {f"plain,{name}" for name in preset_names()}
    assert presets <= set(completions(environment, "microvlm-train", "costs", "--model", ""))
    offered = completions(environment, "microvlm-train", "", cwd=tmp_path)
    assert {f"plain,{name}" for name in packaged_recipes()} <= set(offered)
    assert {"plain,watch", "plain,costs"} <= set(offered)
    assert "plain,--data" in completions(environment, "microvlm-train", "stage1", "--da")


@pytest.mark.posix
def test_a_bundled_name_does_not_hide_a_folder_that_begins_like_it(environment, tmp_path):
    (tmp_path / "photo-1.58bit").mkdir()
    (tmp_path / "photo of a cat").mkdir()
    (tmp_path / "photo.txt").write_text("")
    found = completions(environment, "microvlm-export", "ph", cwd=tmp_path)
    assert found == ["plain,photo", "plain,photo-1.58bit"]
    assert completions(environment, "microvlm-export", "photo-", cwd=tmp_path) == ["dir,photo-"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_completion_imports_nothing_heavy(program):
    code = (
        f"import sys, {PROGRAMS[program]} as module; module.whole_command()\n"
        "from microvlm.terminal import suggestions\n"
        "for known in vars(suggestions).values():\n"
        "    isinstance(known, suggestions.Suggested) and list(known.names())\n"
        f"print(*set({HEAVY!r}) & set(sys.modules))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == ""


def shell_or_skip(shell: str) -> str:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not installed: apt-get install {shell}")
    if shell == "bash":
        is_new = "(( BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404 ))"
        if subprocess.run([path, "-c", is_new]).returncode:
            pytest.skip("bash is older than 4.4, the first that click's script can use")
    return path


@pytest.mark.posix
@pytest.mark.parametrize("program", PROGRAMS)
def test_bash_completes_every_program(program, environment, tmp_path):
    file = tmp_path / "completion.bash"
    file.write_text(shell_completion.scripts("bash"))
    (tmp_path / "some-picture.png").write_text("")
    with Terminal(
        [shell_or_skip("bash"), "--norc", "--noprofile", "-i"], environment, cwd=tmp_path
    ) as terminal:
        terminal.type(f"bind 'set enable-bracketed-paste off'; source {file}; echo re''ady\n")
        terminal.read_until("ready")
        at = len(terminal.written)
        option = "--hel"
        terminal.type(f"{program} {option}\t")
        assert f"{program} --help " in terminal.read_until("--help ", at)
        if program == "microvlm":
            terminal.type("\x15microvlm caption some-p\t")
            terminal.read_until("caption some-picture.png", at)


@pytest.mark.posix
def test_zsh_completes_a_command_an_option_and_a_path(environment, tmp_path):
    file = tmp_path / "completion.zsh"
    file.write_text(shell_completion.scripts("zsh"))
    (tmp_path / "some-picture.png").write_text("")
    with Terminal([shell_or_skip("zsh"), "-f", "-i"], environment, cwd=tmp_path) as terminal:
        terminal.type(f"autoload -Uz compinit; compinit -u -D; source {file}; echo re''ady\n")
        terminal.read_until("ready")
        for typed, completed in (
            ("microvlm cap\t", "microvlm caption "),
            ("microvlm-bench equiv\t", "microvlm-bench equivalence "),
            ("microvlm caption some-p\t", "some-picture.png"),
        ):
            at = len(terminal.written)
            terminal.type(f"\x15{typed}")
            terminal.read_until(completed[-10:].strip(), at)


@pytest.mark.posix
def test_fish_completes_a_command_an_option_and_a_path(environment, tmp_path):
    file = tmp_path / "completion.fish"
    file.write_text(shell_completion.scripts("fish"))
    (tmp_path / "some-picture.png").write_text("")
    for typed, expected in (
        ("microvlm cap", "caption"),
        ("microvlm-bench equiv", "equivalence"),
        ("microvlm-train --start-st", "--start-stage"),
        ("microvlm caption some-p", "some-picture.png"),
    ):
        program = f"source {file}; complete -C '{typed}'"
        process = subprocess.run(
            [shell_or_skip("fish"), "--no-config", "-c", program],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert [line.split("\t")[0] for line in process.stdout.splitlines()] == [expected], process.stderr


@pytest.mark.posix
@pytest.mark.parametrize(
    ("shell", "file"),
    [
        ("bash", ".local/share/bash-completion/completions/microvlm-bench"),
        ("fish", ".config/fish/completions/microvlm-bench.fish"),
        ("zsh", ".zfunc/_microvlm-bench"),
    ],
)
def test_install_writes_a_file_a_program_where_the_shell_looks(shell, file, environment, tmp_path):
    process = subprocess.run(
        ["microvlm", "completion", shell, "--install"],
        env=environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    written = tmp_path / file
    assert written.read_text() == shell_completion.script(shell, "microvlm-bench")
    assert len(list(written.parent.iterdir())) == len(PROGRAMS)
    assert str(written.parent) in process.stdout


@pytest.mark.posix
def test_fish_reads_what_was_installed(environment, tmp_path):
    home = environment | {"HOME": str(tmp_path)}
    fish = shell_or_skip("fish")
    subprocess.run(["microvlm", "completion", "fish", "--install"], env=home, check=True, capture_output=True)
    found = subprocess.run(
        [fish, "-c", "complete -C 'microvlm-export --forc'"],
        env=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.stdout.split("\t")[0].strip() == "--force"
