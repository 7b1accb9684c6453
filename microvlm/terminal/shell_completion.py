"""Shell completion of all console scripts, by click's own scripts: made here, printed or written where a shell looks.

A script asks the program itself what can follow, by the environment variable _PROGRAM_COMPLETE.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import click
from click.shell_completion import get_completion_class

from microvlm.atomic import write_file
from microvlm.cli import PROGRAMS

SHELLS = ("bash", "zsh", "fish")


class Installed(NamedTuple):
    """What was written, and what is left to do."""

    folder: Path
    files: list[str]
    advice: str


def script(shell: str, program: str) -> str:
    """The completion script of one console script."""
    completion = get_completion_class(shell)
    assert completion is not None, shell
    variable = f"_{program.replace('-', '_')}_COMPLETE".upper()
    # Of the command only its name is in the script: nothing of the program is imported.
    maker = completion(click.Command(program), {}, program, variable)
    return (maker.source_template % maker.source_vars()).strip() + "\n"


def scripts(shell: str) -> str:
    """The completion scripts of all console scripts, to be read by the shell at its start."""
    return "\n".join(script(shell, program) for program in PROGRAMS)


def install(shell: str) -> Installed:
    """Write a file for each console script where the shell looks for them. Changes no file of the user's own.

    bash-completion and fish read theirs by themselves when a program's arguments are first completed; zsh has no such
    folder in a home, and is told of ours by two lines of .zshrc.
    """
    folder, name = _place(shell)
    folder.mkdir(parents=True, exist_ok=True)
    files = [name.format(program) for program in PROGRAMS]
    for program, file in zip(PROGRAMS, files, strict=True):
        write_file(folder / file, script(shell, program))
    return Installed(folder, files, _ADVICE[shell].format(folder=folder))


_ADVICE = {
    "bash": "New shells complete them where Debian's bash-completion is installed.",
    "fish": "New shells complete them.",
    "zsh": "Add to .zshrc, before any other compinit:  fpath=({folder} $fpath); autoload -Uz compinit; compinit",
}


def _place(shell: str) -> tuple[Path, str]:
    """The folder of a user's completions, and a file's name in it."""
    home = Path.home()
    if shell == "bash":
        own = os.environ.get("BASH_COMPLETION_USER_DIR")
        data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share")
        return (Path(own) if own else data / "bash-completion") / "completions", "{}"
    if shell == "fish":
        config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        return config / "fish" / "completions", "{}.fish"
    return Path(os.environ.get("ZDOTDIR") or home) / ".zfunc", "_{}"
