"""The command line `microvlm`: the group and its commands. A backend is imported only when a command runs a model."""

from __future__ import annotations

import click

from microvlm import __version__
from microvlm.commands.assemble import assemble
from microvlm.commands.caption import caption
from microvlm.commands.chat import chat
from microvlm.commands.info import info
from microvlm.commands.memory import memory
from microvlm.commands.serve import serve
from microvlm.console import run_click
from microvlm.terminal.completion_command import completion


@click.group()
@click.version_option(__version__)
def cli() -> None:
    """A tiny vision-language model with an episodic memory and 1.58-bit weights.

    \b
    Example: microvlm caption cat.jpg
    """


for command in (assemble, caption, chat, completion, info, memory, serve):
    cli.add_command(command)


def whole_command() -> click.Command:
    """The command of the console script."""
    return cli


def main() -> None:
    """Entry point of the console script."""
    run_click(whole_command())
