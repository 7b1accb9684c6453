"""`microvlm chat`: commands and questions in, answers out, on a terminal or a pipe."""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from microvlm.commands.memory import count_of_entries, describe
from microvlm.commands.options import (
    check_sampling,
    generation_options,
    guess_lines,
    model_options,
    open_model,
    sampling_options,
    show_option,
)
from microvlm.console import BAD_INPUT, describe_os_error, echo, note, note_error
from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.formats.documents import quote
from microvlm.memory.ordinal_questions import check_place, is_ordinal_question
from microvlm.terminal.answer_line import AnswerLine
from microvlm.terminal.pictures import Pictures, open_pictures
from microvlm.terminal.suggestions import FILE

if TYPE_CHECKING:
    from microvlm.backends.threads import Threads
    from microvlm.memory.conversation import Chat

HELP = """\
/image PATH [QUESTION]  show a picture; it is described, or the question answered, and it stays in view
PATH                    the same: a picture dropped on the terminal
/tell QUESTION? TEXT    tell a fact about the picture in view, or about none, and the question that asks for it
/recall QUESTION        ask without the picture in view, from the memory alone
/guesses                the two likeliest answers to the last question
/memory                 what was written into the memory
/reset                  empty the memory and put the picture away
/quit                   leave
Anything else is a question about the picture in view, or for the memory when there is none or when the question is
"what was in the first image?" (second, third, ...)."""

LONGEST_LINE = 1_000_000
"""Characters; above any model's positions."""
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_ENDLESS = 1_000_000_000
_BYTE_ORDER_MARK = "\ufeff"
"""Some editors and shells, mainly on Windows, put it before the first line of UTF-8 text."""


@click.command()
@click.option(
    "--memory",
    "memory_file",
    type=FILE,
    help="Continue the memory in this file, which is created if missing.",
)
@click.option(
    "--min-confidence",
    type=float,
    metavar="P",
    help="Decline answers of less confidence, 0 to 1; the model's own threshold when left out, 0 for none.",
)
@show_option
@sampling_options
@model_options
def chat(
    memory_file: str | None,
    min_confidence: float | None,
    show: bool | None,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    model: str,
    backend: str | None,
    threads: Threads,
    target: str | None,
) -> int:
    """Talk about pictures, which the model remembers; /help lists the commands.

    Lines may come from a pipe. Exit status 2 then means that a line was refused; the others were answered.

    \b
    Example: microvlm chat --memory facts.mem --backend ort
    """
    from microvlm.answers.answering import check_share
    from microvlm.memory.conversation import Chat

    check_sampling(max_new_tokens, temperature, top_p, seed)
    check_share(min_confidence)
    pictures = open_pictures(show)
    runtime, processor, _ = open_model(model, backend, threads, target)
    options = generation_options(processor, max_new_tokens, temperature, top_p, seed)
    conversation = Chat(runtime, processor, options, min_confidence=min_confidence)
    return ChatLoop(conversation, memory_file, pictures).run()


class ChatLoop:
    """Reads the lines of one conversation. A bad line gives one sentence on stderr, and the next line is read.

    Only the end of the input, /quit and a stdout that takes no more answers end it.
    """

    def __init__(self, chat: Chat, memory_file: str | None, pictures: Pictures | None = None):
        """Continues `memory_file` if it exists, and locks it until `run` ends. Raises UserError.

        `pictures`: where a picture is shown that comes into view; None for nowhere.
        """
        from microvlm.memory.file_lock import locked

        self.chat, self.memory_file, self.pictures = chat, memory_file, pictures
        self.image: str | None = None
        self._last: tuple[str, str | None] | None = None
        """The last question and its picture."""
        if memory_file is None:
            self._lock = ExitStack()
            return
        with ExitStack() as lock:
            lock.enter_context(locked(memory_file))
            if Path(memory_file).exists():
                chat.load(memory_file)
                note(f"{memory_file}: {count_of_entries(len(chat.memory.entries))}")
            else:
                # Created at once, so that a path that cannot be written is reported before the first question.
                chat.save(memory_file)
            self._lock = lock.pop_all()

    def run(self) -> int:
        """Handle lines until /quit or the end of the input -> the exit status.

        A refused line of a pipe, or one that could not be saved, gives status 2. At a terminal it gives 0, because the
        user has seen the error.
        """
        at_terminal, has_refused = _is_terminal(), False
        with self._lock:
            for line in _lines(at_terminal):
                try:
                    if self.handle(line.strip()):
                        break
                except BrokenPipeError:
                    raise  # stdout's reader has left
                except UserError as error:
                    note_error(error)
                    has_refused = True
                except OSError as error:
                    note_error(describe_os_error(error))
                    has_refused = True
        return BAD_INPUT if has_refused and not at_terminal else 0

    def handle(self, line: str) -> bool:
        """Handle one line -> whether to stop. Raises UserError and OSError."""
        if len(line) > LONGEST_LINE:
            raise UserError(f"a line has more than {LONGEST_LINE:,} characters; shorten it.")
        if _is_picture(line):
            self._show(line)
            return False
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command in ("/quit", "/exit"):
            return True
        if command == "/help":
            echo(HELP)
        elif command == "/guesses":
            self._guess()
        elif command == "/memory":
            self._list()
        elif command == "/reset":
            self.chat.reset()
            self.image = None
            self._save()
            note("the memory is empty")
        elif command == "/image":
            self._show(rest)
        elif command == "/tell":
            self._tell(rest)
        elif command == "/recall":
            self._ask(rest, None)
        elif command.startswith("/"):
            raise UserError(f"unknown command {quote(command)}; /help lists them.")
        elif line:
            self._ask(line, None if is_ordinal_question(line) else self.image)
        return False

    def _show(self, rest: str) -> None:
        from microvlm.inputs.images import check_file

        path, question = _split_path(rest)
        check_file(path)
        if self.pictures is not None:
            self.pictures.show(path)
        self._ask(question or self.chat.processor.config.prompt.caption_prompt, path, is_new=True)
        self.image = path

    def _ask(self, question: str, image: str | None, is_new: bool = False) -> None:
        if not question:
            raise UserError("ask something after /recall.")
        if image is None:
            check_place(question, self.chat.memory.image_count)
        label = Path(image).name if image else ""
        line = None
        if self.chat.runtime.config.answers is not None:  # other answers are final, piece by piece
            line = AnswerLine.on_terminal(self.chat.processor.stream(), "", is_final=False)
        if line is None:
            turn = self.chat.ask(question, image, is_new, lambda text: echo(text, end=""), label)
            echo()
        else:
            try:
                turn = self.chat.ask(question, image, is_new, line.finish, label, line.feed)
            finally:
                line.close()  # where there was no answer
        self._last = question, image
        if turn.from_memory:
            note(f"(from the memory, confidence {turn.confidence:.2f})")
        self._save()

    def _tell(self, rest: str) -> None:
        """Write a fact: under the question before its question mark, or without one under the picture in view."""
        from microvlm.memory.facts import FactMemory

        question, mark, text = (part.strip() for part in rest.rpartition("?"))
        if not text or (mark and not question):
            raise UserError('give a question and what answers it, such as "/tell whose is this? anna".')
        facts = FactMemory(self.chat.runtime, self.chat.processor, self.chat.memory)
        entry = facts.write(text, question + mark, self.image, Path(self.image).name if self.image else "")
        note(f"remembered: {printable(entry.text)}")
        self._save()

    def _guess(self) -> None:
        from microvlm.answers.answering import GUESSES, Answer
        from microvlm.loaded_model import LoadedModel

        if self._last is None:
            raise UserError("ask something before /guesses.")
        question, image = self._last
        model = LoadedModel(self.chat.runtime, self.chat.processor)
        memory = self.chat.memory if image is None else None
        answer = model.answer(image, question, self.chat.options, memory=memory, guesses=GUESSES)
        assert isinstance(answer, Answer)  # of one question
        for line in guess_lines(answer.guesses):
            echo(line)

    def _save(self) -> None:
        if self.memory_file is not None:
            self.chat.save(self.memory_file)

    def _list(self) -> None:
        memory = self.chat.memory
        for line in describe(memory.entries, memory.slots, len(memory.states)):
            echo(line)


def _split_path(rest: str) -> tuple[str, str]:
    """Split `PATH [QUESTION]`. Spaces in PATH are quoted or escaped as in a shell, or PATH stands alone.

    A path that exists as typed is taken unchanged, because a name may contain quotes and backslashes.
    """
    if not rest:
        raise UserError("give a picture: /image PATH.")
    if os.path.exists(rest):
        return rest, ""
    word, _, question = rest.partition(" ")
    if os.path.exists(word):
        return word, question.strip()
    stream = io.StringIO(rest)
    lexer = shlex.shlex(stream, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        path = lexer.get_token()
    except ValueError:  # an open quote, as in it's.png
        path = None
    # The lexer reads one character at a time and stops after the one that ends the word.
    return (path, rest[stream.tell() :].strip()) if path else (word, question.strip())


def _is_picture(line: str) -> bool:
    """Whether a line is the path of a picture file, as a terminal writes one that is dropped on it."""
    if not line.rstrip("'\"").lower().endswith(PICTURE_SUFFIXES):
        return False
    path, question = _split_path(line)
    return not question and os.path.isfile(path)


def _is_terminal() -> bool:
    """Whether a person types the lines. Streams that were closed before the start are None."""
    return sys.stdin is not None and sys.stdout is not None and sys.stdin.isatty()


def _lines(at_terminal: bool) -> Iterator[str]:
    if sys.stdin is None:
        return
    if not at_terminal:
        # An invalid byte makes a strange question; it does not end the conversation.
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        for number, line in enumerate(iter(lambda: _read_line(sys.stdin), "")):
            yield line.removeprefix(_BYTE_ORDER_MARK) if number == 0 else line
        return
    note("/help lists the commands, /quit leaves")
    while True:
        try:
            yield input("> ")
        except EOFError:
            echo()
            return


def _read_line(stream: TextIO) -> str:
    """The next line, empty at the end. Of a longer line than `LONGEST_LINE` so much that it is seen to be longer.

    Raises UserError for an input without line ends, such as /dev/zero.
    """
    line = stream.readline(LONGEST_LINE + 2)
    if len(line) < LONGEST_LINE + 2 or line.endswith("\n"):
        return line
    for _ in range(_ENDLESS // LONGEST_LINE):
        rest = stream.readline(LONGEST_LINE)
        if not rest or rest.endswith("\n"):
            return line
    raise UserError(f"the input has no line end in {_ENDLESS:,} characters; give lines of text.")
