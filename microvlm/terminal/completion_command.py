"""`microvlm completion`: shell completion of every console script of the package."""

from __future__ import annotations

import click

from microvlm.console import after_saving, echo
from microvlm.terminal import shell_completion


@click.command()
@click.argument("shell", type=click.Choice(shell_completion.SHELLS))
@click.option(
    "--install",
    is_flag=True,
    help="Write a file for each command where the shell looks for them in your home, instead of printing.",
)
def completion(shell: str, install: bool) -> None:
    """Print the completion of all commands for SHELL, to be read at its start, or install it.

    Completes commands, options, paths, and names of models, backends, presets and recipes. In the shell's start file,
    bash and zsh take `eval "$(microvlm completion bash)"`, zsh after compinit; fish takes
    `microvlm completion fish | source`.

    \b
    Example: microvlm completion bash --install
    """
    if not install:
        echo(shell_completion.scripts(shell), end="")
        return
    installed = shell_completion.install(shell)
    with after_saving():
        echo(f"{installed.folder}: {', '.join(installed.files)}")
        echo(installed.advice)
