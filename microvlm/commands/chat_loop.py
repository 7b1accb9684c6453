"""The lines of `microvlm chat`: commands and questions in, answers out. Works on a terminal and on a pipe."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import click

from microvlm.commands.memory_command import count_of_entries, describe
from microvlm.console import BAD_INPUT, note
from microvlm.errors import UserError
from microvlm.inputs.images import check_file
from microvlm.memory.conversation import Chat
from microvlm.memory.file_lock import locked

HELP = """\
/image PATH [QUESTION]  show a picture; it is described, or the question answered, and it stays in view
/recall QUESTION        ask without the picture in view, from the memory alone
/memory                 what was written into the memory
/reset                  empty the memory and put the picture away
/quit                   leave
Anything else is a question about the picture in view, or for the memory when there is none."""


class ChatLoop:
    """One conversation. A mistake is one sentence on stderr, and the next line is read."""

    def __init__(self, chat: Chat, memory_file: str | None):
        """Carries on in `memory_file` when it exists; nobody else changes it until `run` ends. Raises UserError."""
        self.chat, self.memory_file = chat, memory_file
        self.picture: str | None = None
        if memory_file is None:
            self._lock = ExitStack()
            return
        with ExitStack() as lock:
            lock.enter_context(locked(memory_file))
            if Path(memory_file).exists():
                chat.load(memory_file)
                note(f"{memory_file}: {count_of_entries(len(chat.memory.entries))}")
            else:
                # Made at once, so that a place that can't be written is known before anything is said.
                chat.save(memory_file)
            self._lock = lock.pop_all()

    def run(self) -> int:
        """Until /quit or the end of the input -> the exit status.

        A person at a terminal has seen what was wrong: 0. A script has not, when a line of its pipe was refused: 2.
        """
        at_terminal, refused = sys.stdin.isatty(), False
        with self._lock:
            for line in _lines():
                try:
                    if self.handle(line.strip()):
                        break
                except UserError as error:
                    note(f"Error: {error}")
                    refused = True
        return BAD_INPUT if refused and not at_terminal else 0

    def handle(self, line: str) -> bool:
        """One line; True to stop. Raises UserError."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command in ("/quit", "/exit"):
            return True
        if command == "/help":
            click.echo(HELP)
        elif command == "/memory":
            self._list()
        elif command == "/reset":
            self.chat.reset()
            self.picture = None
            self._keep()
            note("the memory is empty")
        elif command == "/image":
            self._show(rest)
        elif command == "/recall":
            self._ask(rest, None)
        elif command.startswith("/"):
            raise UserError(f"unknown command {command}; /help lists them.")
        elif line:
            self._ask(line, self.picture)
        return False

    def _show(self, rest: str) -> None:
        path, question = _split_path(rest)
        check_file(path)
        self._ask(question or self.chat.processor.config.prompt.caption_prompt, path, new=True)
        self.picture = path

    def _ask(self, question: str, picture: str | None, new: bool = False) -> None:
        if not question:
            raise UserError("ask something after /recall.")
        label = Path(picture).name if picture else ""
        turn = self.chat.ask(
            question, picture, new_image=new, on_text=lambda text: click.echo(text, nl=False), label=label
        )
        click.echo()
        if turn.recalled:
            note(f"(from the memory, scope {turn.scope:.2f})")
        self._keep()

    def _keep(self) -> None:
        if self.memory_file is not None:
            self.chat.save(self.memory_file)

    def _list(self) -> None:
        memory = self.chat.memory
        for line in describe(memory.entries, memory.slots, len(memory.states)):
            click.echo(line)


def _split_path(rest: str) -> tuple[str, str]:
    """Split `PATH [QUESTION]`. Spaces in PATH are quoted or escaped as in a shell, or PATH stands alone.

    A path that exists as it was typed is taken as it is: a name may contain quotes and backslashes.
    """
    if not rest:
        raise UserError("give a picture: /image PATH.")
    if Path(rest).exists():
        return rest, ""
    word, _, question = rest.partition(" ")
    if Path(word).exists():
        return word, question.strip()
    stream = io.StringIO(rest)
    lexer = shlex.shlex(stream, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        path = lexer.get_token()
    except ValueError:  # an open quote, as in it's.png
        path = None
    # The lexer reads one character at a time, and stops after the one that ended the word.
    return (path, rest[stream.tell() :].strip()) if path else (word, question.strip())


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        # A stray byte is a strange question, not the end of the conversation.
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        yield from sys.stdin
        return
    note("/help lists the commands, /quit leaves")
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return
