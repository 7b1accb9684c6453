"""The help text of every command of every console script: a purpose, every option explained, an example that parses."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from collections.abc import Iterator

import click
import pytest

from microvlm.cli import PROGRAMS

EXAMPLE = re.compile(r"^\s*(?:Example: |  )(microvlm(?:-\w+)? .*)$", re.MULTILINE)


def walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    yield " ".join(path), command
    if isinstance(command, click.Group):
        for name, sub_command in command.commands.items():
            yield from walk(sub_command, (*path, name))


def program_of(name: str) -> click.Command:
    return importlib.import_module(PROGRAMS[name]).whole_command()


COMMANDS = dict(entry for name in PROGRAMS for entry in walk(program_of(name), (name,)))
GROUPS_OWN = {"microvlm-train": "microvlm-train train"}
"""A group whose examples are another command's."""


def examples(command: click.Command) -> list[str]:
    text = inspect.cleandoc(f"{command.help or ''}\n\n{command.epilog or ''}".replace("\b", ""))
    return EXAMPLE.findall(text)


def test_all_commands_are_looked_at():
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("path", COMMANDS)
def test_a_help_text_begins_with_a_sentence_and_explains_every_option(path):
    command = COMMANDS[path]
    purpose = inspect.cleandoc(command.help or "").partition("\n\n")[0]
    assert purpose.endswith((".", ")")), purpose
    assert purpose[0].isupper()
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []


@pytest.mark.parametrize("path", COMMANDS)
def test_an_example_parses_and_reaches_its_command(path, monkeypatch):
    """The example's words go through the real parser to the end; only what the command does is left out."""
    reached: list[str] = []
    for name, command in COMMANDS.items():
        if not isinstance(command, click.Group):
            monkeypatch.setattr(command, "callback", lambda name=name, **_: reached.append(name))
    lines = examples(COMMANDS[path])
    assert lines, f"{path} --help shows no example"
    for line in lines:
        assert len(line) <= 100, "a longer line is wrapped by a terminal, and copied with its breaks"
        program, *words = shlex.split(line)
        program_of(program).main(words, prog_name=program, standalone_mode=False)
    if isinstance(COMMANDS[path], click.Group):
        assert all(name.startswith(GROUPS_OWN.get(path, path)) for name in reached)
    else:
        assert reached == [path] * len(lines)


@pytest.mark.parametrize("path", COMMANDS)
def test_an_example_stands_on_one_line_of_the_help_text(path):
    command = COMMANDS[path]
    shown = command.get_help(click.Context(command, info_name=path, terminal_width=80))
    for line in examples(command):
        assert line in shown


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("microvlm caption", ["caption", "--no-such-option", "cat.jpg"]),
        ("microvlm-data photo", ["photo", "--count", "many"]),
    ],
)
def test_a_wrong_example_would_be_refused(path, words):
    with pytest.raises(click.UsageError):
        program_of(path.split()[0]).main(words, standalone_mode=False)
